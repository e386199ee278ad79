// A colour for every run, which it keeps while others come and go beside it where that can be.

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
  if (chosen) return chosen === "dark";
  return systemDark.matches;
}

export function paint(index) {
  const colors = isDark() ? DARK : LIGHT;
  return colors[index % colors.length];
}

export function bothPaints(index) {
  return [LIGHT[index % LIGHT.length], DARK[index % DARK.length]];
}

function hashText(text) {
  let hash = 2166136261;
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 16777619);
  return hash >>> 0;
}

const FIRST = 9; // the colours that nobody mistakes for each other

// Each id prefers the place among the first that its hash names, and takes the next free one, in the
// order of the ids: the same set of runs always gets the same colours, and up to twenty runs get as
// many.
export function assignColors(ids) {
  const taken = new Set();
  const places = new Map();
  for (const id of [...ids].sort()) {
    const hash = hashText(id);
    const order = LIGHT.map((_, n) => (n < FIRST ? (hash + n) % FIRST : n));
    const place = order.find((candidate) => !taken.has(candidate)) ?? hash % LIGHT.length;
    taken.add(place);
    places.set(id, place);
  }
  return places;
}
