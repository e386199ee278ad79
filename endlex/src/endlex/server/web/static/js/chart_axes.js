// What uPlot is told: scales, axes and their labels for every kind of x. It draws axes, grid,
// cursor and selection; the lines are drawn by `plot_lines.js`, each with its own x.

import { isDark } from "./colors.js";
import { formatDate, formatDuration, formatInteger, formatNumber } from "./format.js";

export const X_KINDS = {
  step: { label: "Step", format: (x) => `step ${formatInteger(x)}` },
  elapsed: { label: "Time since start", format: (x) => formatDuration(x) },
  time: { label: "Clock", format: (x) => formatDate(x) },
  "train/tokens": { label: "Tokens", format: (x) => `${formatNumber(x)} tokens` },
  "train/flops": { label: "FLOPs", format: (x) => `${formatNumber(x)} FLOPs` },
};

const [MINUTE, HOUR, DAY] = [60, 3600, 86400];
const DURATION_STEPS = [
  0.001, 0.01, 0.1, 1, 2, 5, 10, 20, 30, MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE, 20 * MINUTE,
  30 * MINUTE, HOUR, 2 * HOUR, 4 * HOUR, 6 * HOUR, 12 * HOUR, DAY, 2 * DAY, 5 * DAY, 10 * DAY,
  20 * DAY, 50 * DAY, 100 * DAY,
];

const CSS_CACHE = new Map();

// A colour of the style sheet, for the canvas.
export function cssColor(name) {
  const key = `${isDark()}|${name}`;
  if (!CSS_CACHE.has(key)) {
    CSS_CACHE.set(key, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  }
  return CSS_CACHE.get(key);
}

function axisBase(space) {
  return {
    font: "11px system-ui, sans-serif",
    stroke: cssColor("--quiet"),
    grid: { stroke: cssColor("--grid"), width: 1 },
    ticks: { stroke: cssColor("--grid"), width: 1, size: 4 },
    gap: 4,
    space,
  };
}

function xAxis(kind, logarithmic) {
  const axis = { ...axisBase(kind === "time" ? 80 : 70), size: kind === "time" ? 44 : 28 };
  if (kind === "elapsed") {
    if (!logarithmic) axis.incrs = DURATION_STEPS;
    axis.values = (u, splits) => splits.map((x) => (x === null ? "" : shortDuration(x)));
  } else if (kind !== "time") {
    axis.values = (u, splits) => splits.map((x) => (x === null ? "" : formatNumber(x)));
  }
  return axis;
}

function shortDuration(seconds) {
  if (seconds === 0) return "0";
  return formatDuration(seconds).replace(/ 0[smh]$/, "");
}

function yAxis() {
  return {
    ...axisBase(34),
    size: (u, values) => Math.min(84, 16 + 6.4 * Math.max(3, ...(values || []).map((text) => String(text ?? "").length))),
    values: (u, splits) => splits.map((y) => (y === null ? "" : axisNumber(y, splits))),
  };
}

// As many digits as keep neighbouring ticks apart.
function axisNumber(value, splits) {
  const distinct = splits.filter((y) => y !== null);
  const step = distinct.length > 1 ? Math.abs(distinct[1] - distinct[0]) : 0;
  const size = Math.max(...distinct.map(Math.abs));
  if (value === 0) return "0";
  if (size >= 1e4 && step >= 1) return formatNumber(value);
  if (size < 1e-3) return value.toExponential(1);
  // The fewest decimals in which the step itself is exact: 0.25 needs two, 0.2 one.
  let decimals = 0;
  while (decimals < 8 && Math.abs(Number(step.toFixed(decimals)) - step) > step * 1e-6) decimals += 1;
  return value.toFixed(decimals);
}

// Options for one chart; `range` answers {x: [min, max], y: [min, max]} at any time.
export function plotOptions({ width, height, kind, logX, logY, range, hooks }) {
  return {
    width,
    height,
    padding: [10, 12, 0, 0],
    legend: { show: false },
    focus: { alpha: 1 },
    cursor: {
      y: false,
      points: { show: false },
      drag: { x: true, y: false, setScale: false, dist: 5 },
      // Moving is shared with the other charts; pressing and dragging are this one's own.
      sync: {
        key: "endlex",
        setSeries: false,
        scales: ["x", null],
        filters: { pub: (type) => type === "mousemove" || type === "mouseleave" },
      },
      bind: { dblclick: () => null },
    },
    scales: {
      x: { time: kind === "time", distr: logX ? 3 : 1, range: () => range().x },
      y: { distr: logY ? 3 : 1, range: () => range().y },
    },
    axes: [
      logX ? { ...xAxis(kind, logX), ...logTicks(() => range().x) } : xAxis(kind, logX),
      logY ? { ...yAxis(), ...logTicks(() => range().y) } : yAxis(),
    ],
    series: [{}, { show: true, paths: () => null, points: { show: false } }],
    hooks,
  };
}

function logTicks(range) {
  return {
    splits: () => logSplits(...range()),
    filter: (u, splits) => splits,
    values: (u, splits) => splits.map((value) => formatNumber(value)),
  };
}

// Powers of ten, with their doubles and halves where there are few; plain steps within one decade.
function logSplits(min, max) {
  const decades = Math.log10(max / min);
  if (!(decades > 0)) return [min];
  if (decades < 0.7) {
    const rough = (max - min) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((n) => n * power >= rough);
    const count = Math.floor(max / step) - Math.ceil(min / step) + 1;
    return Array.from({ length: count }, (_, i) => Number(((Math.ceil(min / step) + i) * step).toPrecision(12)));
  }
  const digits = decades < 3 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil(decades / 7));
  const splits = [];
  for (let power = Math.floor(Math.log10(min)); power <= Math.log10(max); power += every) {
    for (const digit of digits) {
      const value = Number(`${digit}e${power}`);
      if (value >= min && value <= max) splits.push(value);
    }
  }
  return splits;
}
