// The values under the cursor: in a chart's head for one line, in a box beside the cursor for many.

import { el, replaceContent } from "./dom.js";
import { requestDraw, throttleFrames } from "./frames.js";
import { formatInteger, formatNumber, isMoreBetter } from "./format.js";
import { nearestIndex } from "./plot_lines.js";

const ROWS = 12;

export class ChartReadout {
  constructor(chart) {
    this.chart = chart;
    this.value = el("output", { class: "chart-value" });
    this.tip = el("div", { class: "chart-tip", hidden: true });
    this.rows = [];
    this.move = throttleFrames(() => this.update());
  }

  // Without a cursor: the latest value, or how many runs.
  summarize() {
    const { drawn: lines, groups, plot } = this.chart;
    if (plot?.cursor.left >= 0) return;
    if (groups && groups.length <= 4) return void replaceContent(this.value, groups.map(({ hue, label }) => [swatch(hue), `${label.replace(/^.* = /, "")} `]));
    if (lines.length > 1) {
      const shown = lines.filter((line) => line.loaded && !line.hidden && line.shown(null).x.length).length;
      this.value.textContent = `${shown} ${groups ? "group" : "line"}${shown === 1 ? "" : "s"}`;
      return;
    }
    const series = lines[0]?.loaded && lines[0].shown(null);
    if (!series) return;
    const last = series.y.length ? series.y[series.y.length - 1] : undefined;
    this.value.textContent = last === undefined ? "no values" : formatNumber(last);
    this.describe(series, last);
  }

  // For who cannot see the canvas.
  describe(series, last) {
    const { chart } = this;
    let low = Infinity;
    let high = -Infinity;
    for (const value of series.y) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    const range = low <= high ? `, from ${formatNumber(low)} to ${formatNumber(high)}` : "";
    chart.body.setAttribute(
      "aria-label",
      `${chart.title}: ${formatInteger(series.count)} points${range}, last ${formatNumber(last)}. ` +
        "Arrow keys move, plus and minus zoom, 0 shows all.",
    );
  }

  leave() {
    this.tip.hidden = true;
    this.emphasize(null);
  }

  update() {
    const { plot } = this.chart;
    if (this.chart.root.classList.contains("panning")) return this.leave();
    if (!plot || !(plot.cursor.left >= 0)) {
      this.leave();
      return this.summarize();
    }
    const x = plot.posToVal(plot.cursor.left, "x");
    const found = this.nearest(x);
    if (!found.length) return this.leave();
    if (this.chart.drawn.length === 1) {
      const [{ value, at, special }] = found;
      this.value.textContent = `${special || formatNumber(value)} · ${this.chart.formatX(at)}`;
      return undefined;
    }
    this.value.textContent = this.chart.formatX(x);
    // The box only where the pointer itself is, not in the charts whose cursor follows it.
    if (!this.chart.body.matches(":hover")) return this.leave();
    return this.fill(found, plot);
  }

  nearest(x) {
    const { chart } = this;
    const strength = chart.settings.smoothing;
    const found = [];
    for (const line of chart.drawn) {
      if (line.hidden || !line.loaded) continue;
      const series = line.shown(chart.view);
      const index = nearestIndex(series.x, x);
      if (index < 0) continue;
      const at = series.x[index];
      const raw = series.y[index];
      const value = strength > 0 ? line.average(series, strength)[index] : raw;
      const special = Number.isNaN(raw) ? kindAt(series, at) : "";
      found.push({ line, at, value, raw, special });
    }
    const sign = isMoreBetter(chart.metric) ? -1 : 1;
    return found.sort((a, b) => (Number.isNaN(a.value) ? 1 : Number.isNaN(b.value) ? -1 : sign * (a.value - b.value)));
  }

  // The line under the pointer, then the best ones.
  fill(found, plot) {
    const closest = this.closest(found, plot);
    this.emphasize(closest);
    const best = found.filter((entry) => entry !== closest).slice(0, ROWS - 1);
    const rows = [closest, ...best].map((entry) =>
      el(
        "div",
        { class: entry === closest ? "tip-row tip-closest" : "tip-row" },
        swatch(entry.line.hue),
        el("span", { class: "tip-label" }, entry.line.label),
        el("span", { class: "tip-value" }, entry.special || formatNumber(entry.value), entry === found[0] && found.length > 1 ? " ★" : ""),
      ),
    );
    const more = found.length - rows.length;
    replaceContent(this.tip, rows, more > 0 && el("div", { class: "quiet" }, `and ${more} more`));
    this.tip.hidden = false;
    this.place(plot);
  }

  place(plot) {
    const root = this.chart.root.getBoundingClientRect();
    const over = plot.over.getBoundingClientRect();
    const left = over.left - root.left + plot.cursor.left;
    const width = this.tip.offsetWidth;
    const right = left + 16 + width < root.width;
    this.tip.style.left = `${Math.max(4, right ? left + 16 : left - width - 16)}px`;
    this.tip.style.top = `${over.top - root.top + 8}px`;
  }

  closest(found, plot) {
    const y = plot.cursor.top;
    const away = ({ value }) => Math.abs(plot.valToPos(value, "y") - y);
    let best = found[0];
    for (const entry of found) if (away(entry) < away(best) || Number.isNaN(best.value)) best = entry;
    return best;
  }

  emphasize(entry) {
    let changed = false;
    for (const line of this.chart.drawn) {
      const on = line === entry?.line;
      if ((line.emphasized || false) !== on) {
        line.emphasized = on;
        changed = true;
      }
    }
    if (changed) requestDraw(this.chart, true);
  }
}

function kindAt(series, at) {
  return series.nonfinite.find(([from, to]) => from <= at && at <= to)?.[2] || "NaN";
}

export function swatch([light, dark]) {
  const mark = el("span", { class: "swatch", "aria-hidden": "true" });
  mark.style.setProperty("--light", light);
  mark.style.setProperty("--dark", dark);
  return mark;
}
