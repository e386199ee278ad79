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
  const filter = el("input", {
    type: "search", placeholder: "Filter charts", value: board.filter, "aria-label": "Filter charts by name",
    title: "Parts of names, or regular expressions; all of them must hold",
    oninput: debounce(() => board.setFilter(filter.value), 120),
  });
  return el(
    "div",
    { class: "toolbar board-toolbar" },
    filter,
    el("label", { class: "field" }, "x", axisSelect(board)),
    smoothing(board),
    toggle(board, "logX", "log x", "Logarithmic x axis"),
    toggle(board, "logY", "log y", "Logarithmic y axis"),
    toggle(board, "fit", "fit y", "Let the y axis leave out the lowest and highest 2.5 % of values where it gets clearer; ▲ marks them"),
    toggle(board, "together", "zoom together", "Zoom every chart along"),
    toggle(board, "pan", "drag pans", "Dragging moves instead of zooming (so does Shift-drag)"),
    board.runs.length > 1 && grouping(board),
    el("button", { type: "button", class: "button", title: "Open or close all groups", onclick: () => board.foldAll() }, "fold"),
    board.panels && board.source.live && el("button", { type: "button", class: "button", onclick: () => board.panels.edit(board.metrics, board.xKinds) }, "+ panel"),
    el("span", { class: "hint quiet" }, "drag: zoom · Shift-drag: pan · Ctrl-wheel: zoom · double-click: all · ?: keys"),
  );
}

function options(pairs, chosen) {
  return pairs.map(([value, text]) => el("option", { value, selected: value === chosen }, text));
}

function axisSelect(board) {
  const { settings, xKinds } = board;
  const others = board.metrics.filter((name) => !xKinds.includes(name));
  const kinds = options(xKinds.map((kind) => [kind, X_KINDS[kind]?.label || kind]), settings.x);
  const more = board.addressed && el("optgroup", { label: "metrics" }, options(others.map((name) => [name, name]), settings.x));
  const axis = el("select", { "aria-label": "Horizontal axis", onchange: () => board.change({ x: axis.value }) }, kinds, more);
  return axis;
}

function smoothing(board) {
  const apply = throttleFrames((strength) => board.change({ smoothing: strength }));
  const slid = () => {
    const strength = strengthOf(Number(slider.value));
    number.value = strength.toFixed(strength > 0.99 ? 3 : 2);
    apply(strength);
  };
  const typed = () => {
    const strength = Math.min(0.999, Math.max(0, Number(number.value) || 0));
    slider.value = String(positionOf(strength));
    apply(strength);
  };
  const slider = el("input", { type: "range", min: "0", max: "100", step: "1", "aria-label": "Smoothing", oninput: slid });
  const number = el("input", { type: "number", class: "smoothing-value", min: "0", max: "0.999", step: "0.01", "aria-label": "Strength as a number", onchange: typed });
  slider.value = String(positionOf(board.settings.smoothing));
  number.value = String(Number(board.settings.smoothing.toFixed(3)));
  const title = "Exponential moving average, corrected for its start, in which a spike of one point does not count; the raw values stay, faint";
  return el("span", { class: "field", title }, "smooth", slider, number);
}

function grouping(board) {
  const by = el(
    "select",
    { "aria-label": "Group runs by", title: "Runs of a group become their mean with a band", onchange: () => (board.change({ groupBy: by.value }), (band.hidden = !by.value)) },
    options(board.groupings(), board.settings.groupBy),
  );
  const band = el(
    "select",
    { "aria-label": "Band of a group", hidden: !board.settings.groupBy, onchange: () => board.change({ band: band.value }) },
    options([["range", "lowest to highest"], ["error", "standard error"]], board.settings.band),
  );
  return el("span", { class: "field" }, "group", by, band);
}

function toggle(board, name, text, title) {
  const change = () => {
    board.change({ [name]: !board.settings[name] });
    button.setAttribute("aria-pressed", String(board.settings[name]));
  };
  const button = el("button", { type: "button", class: "toggle", data: { setting: name }, title, "aria-pressed": String(Boolean(board.settings[name])), onclick: change }, text);
  return button;
}
