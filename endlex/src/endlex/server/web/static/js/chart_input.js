// How a chart is moved: drag to zoom (uPlot's selection), Shift-drag or the middle button to pan,
// Ctrl-wheel to zoom, double-click to show all; pinch and drag on a touch screen; and the keyboard.

import { throttleFrames } from "./frames.js";

const STEP = 0.15; // of the view's width, for one press of an arrow
const ZOOM = 1.35;

export function attachInput(chart) {
  const { body } = chart;
  const setView = throttleFrames((view) => chart.onview(chart, view));
  body.addEventListener("mousedown", (event) => startPan(chart, event, setView), true);
  body.addEventListener("dblclick", () => chart.onview(chart, null));
  body.addEventListener("wheel", (event) => wheel(chart, event, setView), { passive: false });
  body.addEventListener("keydown", (event) => key(chart, event));
  attachTouch(chart, setView);
}

// The view in coordinates in which moving is adding: the logarithm on a log axis.
function axis(chart) {
  const log = chart.settings.logX;
  const to = log ? Math.log10 : (value) => value;
  const from = log ? (value) => 10 ** value : (value) => value;
  const [low, high] = chart.box.x;
  return { low: to(low), high: to(high), back: (a, b) => ({ from: from(a), to: from(b) }) };
}

function moved({ low, high, back }, share) {
  const shift = (high - low) * share;
  return back(low + shift, high + shift);
}

function zoomed({ low, high, back }, factor, share = 0.5) {
  const center = low + (high - low) * share;
  return back(center - (center - low) / factor, center + (high - center) / factor);
}

// Where a pointer is on the plot, 0 at its left edge and 1 at its right.
function shareAt(chart, clientX) {
  const box = chart.plot.over.getBoundingClientRect();
  return Math.min(1, Math.max(0, (clientX - box.left) / box.width));
}

function startPan(chart, event, setView) {
  const wanted = event.button === 1 || (event.button === 0 && (event.shiftKey || chart.settings.pan));
  if (!chart.plot || !wanted) return;
  event.preventDefault();
  event.stopPropagation(); // or uPlot would begin a selection
  chart.body.focus({ preventScroll: true });
  const start = event.clientX;
  const { width } = chart.plot.over.getBoundingClientRect();
  const origin = axis(chart);
  const move = (next) => setView(moved(origin, (start - next.clientX) / width));
  const end = () => {
    removeEventListener("mousemove", move);
    removeEventListener("mouseup", end);
    chart.root.classList.remove("panning");
  };
  addEventListener("mousemove", move);
  addEventListener("mouseup", end);
  chart.root.classList.add("panning");
}

function wheel(chart, event, setView) {
  // A plain wheel scrolls the page; over an enlarged chart it zooms.
  if (!chart.plot || !(event.ctrlKey || event.metaKey || event.altKey || chart.wide)) return;
  event.preventDefault();
  const factor = Math.exp(-Math.max(-120, Math.min(120, event.deltaY)) / 300);
  setView(zoomed(axis(chart), factor, shareAt(chart, event.clientX)));
}

function key(chart, event) {
  if (!chart.plot || event.ctrlKey || event.metaKey || event.altKey) return;
  const here = axis(chart);
  const views = {
    ArrowLeft: () => moved(here, -STEP),
    ArrowRight: () => moved(here, STEP),
    "+": () => zoomed(here, ZOOM),
    "-": () => zoomed(here, 1 / ZOOM),
    0: () => null,
    Escape: () => null,
  };
  const move = views[event.key === "=" ? "+" : event.key];
  if (!move) return;
  event.preventDefault();
  chart.onview(chart, move());
}

// Two fingers pinch; one drags a chart that is zoomed, and otherwise scrolls the page.
function attachTouch(chart, setView) {
  const { body } = chart;
  const fingers = new Map();
  let origin = null;
  const begin = () => {
    origin = { axis: axis(chart), at: [...fingers.values()] };
  };
  body.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "touch" || !chart.plot) return;
    fingers.set(event.pointerId, event.clientX);
    begin();
  });
  body.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId) || !chart.plot) return;
    fingers.set(event.pointerId, event.clientX);
    const { width } = chart.plot.over.getBoundingClientRect();
    const now = [...fingers.values()];
    if (now.length === 2) {
      const apart = (pair) => Math.max(20, Math.abs(pair[0] - pair[1]));
      const middle = (origin.at[0] + origin.at[1]) / 2;
      setView(zoomed(origin.axis, apart(now) / apart(origin.at), shareAt(chart, middle)));
    } else if (chart.view) setView(moved(origin.axis, (origin.at[0] - now[0]) / width));
  });
  const end = (event) => {
    if (fingers.delete(event.pointerId) && fingers.size) begin();
  };
  body.addEventListener("pointerup", end);
  body.addEventListener("pointercancel", end);
}
