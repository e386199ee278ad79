// A colour for every run, the same on every page: chosen by somebody, or by the run's number.

// Two sets with equal order, one readable on white, one on dark grey.
const LIGHT = [
  "#2f6feb", "#d1502f", "#1a7f4b", "#8a3ffc", "#b58105", "#0b8a9e", "#c2387d",
  "#5b6b1f", "#6f4e37", "#3d4db7", "#e0752d", "#2b8f86", "#a13d9e", "#7a7f87",
  "#bf3145", "#4f8a10", "#0f62a8", "#94621c", "#6a5acd", "#118c5b",
];
const DARK = [
  "#6ea1ff", "#ff8a66", "#4cc38a", "#b98cff", "#e3b341", "#3fc5d8", "#f47ab5",
  "#a9bb55", "#c19a80", "#8f9dff", "#ffab70", "#5fd0c5", "#dd87da", "#b0b6bf",
  "#ff7b8a", "#8fd14f", "#58b0ff", "#d9a866", "#a89bff", "#43d69b",
];

// Asked once: it follows the system by itself.
export const systemDark = matchMedia("(prefers-color-scheme: dark)");

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemDark.matches;
}

// A hue is a pair of colours: on light and on dark ground.
export function hueAt(index) {
  return [LIGHT[index % LIGHT.length], DARK[index % DARK.length]];
}

export function hueOf({ color, number = 0 }) {
  return color ? [color, color] : hueAt(number);
}

export function paint(hue) {
  return hue[isDark() ? 1 : 0];
}
