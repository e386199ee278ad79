// The controls above a board of charts.

import { X_KINDS } from "./chart_axes.js";
import { debounce, el } from "./dom.js";
import { throttleFrames } from "./frames.js";

// The slider's positions are finer towards 1, where the strength matters: 0, 0.5, ..., 0.999.
function strengthOf(position) {
  return position <= 0 ? 0 : Math.min(0.999, 1 - 10 ** ((-3 * position) / 100));
}

function positionOf(strength) {
  return strength <= 0 ? 0 : Math.round((-100 * Math.log10(1 - strength)) / 3);
}

export function boardToolbar(board) {
  const { settings } = board;
  const filter = el("input", {
    type: "search",
    placeholder: "Filter charts",
    "aria-label": "Filter charts by name",
    oninput: debounce(() => board.setFilter(filter.value), 120),
  });
  const axis = el(
    "select",
    { "aria-label": "Horizontal axis", onchange: () => board.change({ x: axis.value }) },
    board.xKinds.map((kind) => el("option", { value: kind, selected: kind === settings.x }, X_KINDS[kind]?.label || kind)),
  );
  return el(
    "div",
    { class: "toolbar board-toolbar" },
    filter,
    el("label", { class: "field" }, "x", axis),
    smoothingSlider(board),
    toggle(board, "logX", "log x", "Logarithmic x axis"),
    toggle(board, "logY", "log y", "Logarithmic y axis"),
    toggle(board, "fit", "fit y", "Let the y axis leave out the lowest and highest 2.5 % of values"),
    toggle(board, "together", "zoom together", "Zoom every chart along"),
    toggle(board, "pan", "drag pans", "Dragging moves instead of zooming (so does Shift-drag)"),
    el(
      "span",
      { class: "hint quiet" },
      "drag: zoom · Shift-drag: pan · Ctrl-wheel: zoom · double-click: all",
    ),
  );
}

function smoothingSlider(board) {
  const shown = el("output", { class: "slider-value" });
  const apply = throttleFrames((smoothing) => board.change({ smoothing }));
  const slider = el("input", {
    type: "range",
    min: "0",
    max: "100",
    step: "1",
    "aria-label": "Smoothing",
    oninput: () => {
      const strength = strengthOf(Number(slider.value));
      shown.textContent = strength.toFixed(strength > 0.99 ? 3 : 2);
      apply(strength);
    },
  });
  slider.value = String(positionOf(board.settings.smoothing));
  shown.textContent = board.settings.smoothing.toFixed(2);
  const title = "Exponential moving average, corrected for its start; the raw values stay, faint";
  return el("label", { class: "field", title }, "smooth", slider, shown);
}

function toggle(board, name, text, title) {
  const button = el(
    "button",
    {
      type: "button",
      class: "toggle",
      data: { setting: name },
      title,
      "aria-pressed": String(Boolean(board.settings[name])),
      onclick: () => {
        const on = !board.settings[name];
        button.setAttribute("aria-pressed", String(on));
        board.change({ [name]: on });
      },
    },
    text,
  );
  return button;
}
