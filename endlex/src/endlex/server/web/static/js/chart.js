// One chart: one or several metrics of one or several runs, on one canvas, built only while it is on
// the screen.

import { paint } from "./colors.js";
import { ChartData } from "./chart_data.js";
import { X_KINDS, cssColor, plotOptions } from "./chart_axes.js";
import { attachInput } from "./chart_input.js";
import { ChartReadout } from "./chart_readout.js";
import { el } from "./dom.js";
import { formatNumber } from "./format.js";
import { cancelDraw, requestDraw } from "./frames.js";
import { GroupLine } from "./group_line.js";
import {
  fillBand, includeValues, markNonFinite, markOutliers, padBounds, pixelScale, strokeLine,
  visibleSpan, withoutOutliers,
} from "./plot_lines.js";

const HEIGHT = 210;
const TALL = 460;
const PER_PIXEL = 16; // points of all lines together, before any zooming: what a frame can draw
// With more points than this in view lines are one device pixel wide. Browsers draw such hairlines
// segment by segment; anything wider becomes an outline that is filled, ten times the work.
const THIN_FROM_POINTS = 2500;

export class Chart {
  // `settings` is the board's, shared by its charts, and `own` what this one has of its own: x, title,
  // logX, logY, smoothing, ranges, size; `onview(chart, view)` asks for a zoom; `buttons` stand in
  // the head: [text, label, call].
  constructor({ metric, title, lines, loader, settings, own = {}, buttons = [], onview }) {
    Object.assign(this, { metric, title, lines, loader, onview });
    this.settings = Object.assign(Object.create(settings), own);
    this.plot = null;
    this.view = null;
    this.wide = own.size === "wide";
    this.groups = null;
    this.box = { x: [0, 1], y: [0, 1] };
    this.build(buttons);
  }

  build(buttons) {
    const button = ([text, label, onclick]) =>
      el("button", { type: "button", class: "icon-button", title: label, "aria-label": `${label}: ${this.title}`, onclick }, text);
    this.resetButton = button(["⟲", "Show all", () => this.onview(this, null)]);
    this.resetButton.hidden = true;
    this.logButton = button(["log", "Logarithmic y axis", () => this.setLogY(!this.settings.logY)]);
    this.wideButton = button(["⤢", "Enlarge", () => this.setWide(!this.wide)]);
    const full = button(["full", "Full screen", () => this.toggleFull()]);
    this.readout = new ChartReadout(this);
    const label = `${this.title}. Arrow keys move, plus and minus zoom, 0 shows all.`;
    this.body = el("div", { class: "chart-body", tabIndex: 0, role: "img", "aria-label": label });
    this.note = el("p", { class: "chart-note quiet" }, "Loading…");
    this.root = el(
      "figure",
      { class: this.wide ? "chart chart-wide" : "chart", data: { metric: this.metric } },
      el(
        "figcaption",
        { class: "chart-head" },
        el("span", { class: "chart-title", title: this.title }, this.title),
        this.readout.value,
        el("span", { class: "chart-buttons" }, this.resetButton, buttons.map(button), this.logButton, full, this.wideButton),
      ),
      this.body,
      this.note,
      this.readout.tip,
    );
    this.root.addEventListener("fullscreenchange", () => this.resize());
    attachInput(this);
  }

  setLogY(on) {
    this.settings.logY = on;
    this.rebuild();
  }

  setWide(on) {
    this.wide = on;
    this.root.classList.toggle("chart-wide", on);
    this.wideButton.textContent = on ? "⤡" : "⤢";
    this.resize();
  }

  toggleFull() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.root.requestFullscreen?.();
  }

  get height() {
    if (document.fullscreenElement === this.root) return this.root.clientHeight - 50;
    return this.wide ? TALL : HEIGHT;
  }

  // Lines whose `labelOf` is the same become one: their mean, with a band. Null parts them again.
  setGroups(labelOf, band, hueOfGroup) {
    this.grouping = labelOf && { labelOf, band, hueOfGroup };
    this.groups = labelOf && this.makeGroups();
    if (this.plot) this.changed();
  }

  makeGroups() {
    const { labelOf, band, hueOfGroup } = this.grouping;
    const members = new Map();
    for (const line of this.lines) {
      const label = labelOf(line.run);
      const key = line.dash ? `${label} · ${line.metric}` : label;
      members.set(key, [...(members.get(key) || []), line]);
    }
    return [...members].map(([label, lines]) => new GroupLine({ label, hue: hueOfGroup(labelOf(lines[0].run)), members: lines, band }));
  }

  addLine(line) {
    this.lines.push(line);
    if (this.grouping) this.groups = this.makeGroups();
    if (this.plot) this.data.loadWhole();
  }

  removeRun(run) {
    for (const line of [...this.lines]) if (line.run === run) this.lines.splice(this.lines.indexOf(line), 1);
    if (this.grouping) this.groups = this.makeGroups();
    if (this.plot) this.changed();
  }

  // What is drawn and read: the lines, or the groups that they are in.
  get drawn() {
    return this.groups || this.lines;
  }

  // ---- on and off the screen

  show() {
    if (this.plot || !window.uPlot) {
      if (!window.uPlot) this.note.textContent = "The chart library is missing: run endlex doctor.";
      return;
    }
    const width = Math.max(160, this.body.clientWidth);
    const { x, logX, logY } = this.settings;
    if (!this.data || this.data.x !== x || this.data.log !== logX) this.startData(width);
    const options = plotOptions({
      width,
      height: this.height,
      kind: x,
      logX,
      logY,
      range: () => this.box,
      hooks: {
        draw: [() => this.drawLines()],
        setCursor: [() => this.readout.move()],
        setSelect: [(plot) => this.selected(plot)],
      },
    });
    this.plot = new window.uPlot(options, [[0, 1], [1, 1]], this.body);
    this.data.loadWhole();
    this.data.want(this.view);
    requestDraw(this);
  }

  startData(width) {
    this.data?.stop();
    for (const line of this.lines) Object.assign(line, { whole: null, detail: null });
    const share = width * Math.min(2, PER_PIXEL / this.lines.length);
    const points = Math.max(200, Math.min(2000, Math.ceil(share / 100) * 100));
    this.data = new ChartData(this.loader, this.lines, {
      x: this.settings.x,
      log: this.settings.logX,
      points,
      onchange: () => this.changed(),
      onerror: (error) => {
        if (error.name !== "AbortError") this.note.textContent = error.message;
      },
    });
  }

  changed() {
    this.readout.summarize();
    requestDraw(this);
  }

  // New points of a run: fetched now if the chart is on the screen, else when it comes there.
  refresh(run, lastStep) {
    if (this.plot) this.data.refresh(run, lastStep);
    else for (const line of this.lines) line.stale ||= line.run === run;
  }

  reload() {
    for (const line of this.lines) line.stale = true;
    if (this.plot) this.data.loadWhole();
  }

  hide() {
    cancelDraw(this);
    this.data?.stop();
    this.plot?.destroy();
    this.plot = null;
    this.readout.leave();
  }

  rebuild() {
    this.logButton.classList.toggle("on", this.settings.logY);
    if (!this.plot) return;
    this.hide();
    this.show();
  }

  resize() {
    if (!this.plot) return;
    const width = Math.max(160, this.body.clientWidth);
    const { height } = this;
    if (width !== this.plot.width || height !== this.plot.height) this.plot.setSize({ width, height });
    requestDraw(this);
  }

  // ---- zooming

  setView(view, urgent) {
    this.view = view;
    this.resetButton.hidden = view === null;
    this.root.classList.toggle("zoomed", view !== null);
    if (!this.plot) return;
    this.data.want(view);
    requestDraw(this, urgent);
  }

  selected(plot) {
    const { left, width } = plot.select;
    if (width < 4) return;
    const from = plot.posToVal(left, "x");
    const to = plot.posToVal(left + width, "x");
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.onview(this, { from, to });
  }

  // ---- drawing

  // Brings the axes to the data in view and repaints; called once a frame at most.
  draw() {
    if (!this.plot) return;
    const positive = this.settings.logX;
    const extent = this.data.extent(positive);
    this.note.hidden = this.lines.some((line) => line.loaded);
    if (!this.note.hidden) return;
    const { xMin, xMax, yMin, yMax, logY } = this.settings;
    const [first, last] = extent || [0, 1];
    const [low, high] = [xMin ?? first, xMax ?? last];
    const view = this.view || { from: low, to: high > low ? high : low + 1 };
    if (positive && !(view.from > 0)) view.from = Math.min(1e-9, view.to / 10);
    const x = [view.from, view.to];
    const y = padBounds(this.valueBounds(view), logY);
    if (yMin !== undefined && (!logY || yMin > 0)) y[0] = yMin;
    if (yMax !== undefined && yMax > y[0]) y[1] = yMax;
    this.box = { x, y };
    this.empty = extent === null;
    this.plot.batch(() => {
      this.plot.setScale("x", { min: x[0], max: x[1] });
      this.plot.setScale("y", { min: y[0], max: y[1] });
    });
    this.draws = (this.draws || 0) + 1;
  }

  valueBounds(view) {
    const { logY, fit } = this.settings;
    const bounds = [Infinity, -Infinity];
    const spans = this.drawn.filter((line) => line.loaded && !line.hidden).flatMap((line) => {
      const series = line.shown(this.view);
      const curves = series.low ? [series.low, series.high] : [series.y];
      return curves.map((y) => ({ x: series.x, y, ...view }));
    });
    for (const { x, y, from, to } of spans) includeValues(bounds, x, y, from, to, logY);
    return fit ? withoutOutliers(bounds, spans, logY) : bounds;
  }

  drawLines() {
    const { plot, settings } = this;
    const context = plot.ctx;
    const { left, top, width, height } = plot.bbox;
    const { x, y } = this.box;
    const toX = pixelScale(x[0], x[1], left, width, settings.logX);
    const toY = pixelScale(y[0], y[1], top + height, -height, settings.logY);
    context.save();
    context.beginPath();
    context.rect(left, top, width, height);
    context.clip();
    context.lineJoin = "bevel";
    const drawn = this.inDrawingOrder().map((line) => {
      const series = line.shown(this.view);
      return { line, series, span: visibleSpan(series.x, x[0], x[1]) };
    });
    const points = drawn.reduce((sum, { span }) => sum + span[1] - span[0], 0);
    const ratio = window.devicePixelRatio || 1;
    const thin = points > THIN_FROM_POINTS ? 1 : 1.4 * ratio;
    for (const item of drawn) this.drawLine(context, item, { toX, toY, width, thin, ratio });
    context.restore();
  }

  drawLine(context, { line, series, span }, { toX, toY, width, thin, ratio }) {
    const { settings, plot, box } = this;
    const { smoothing } = settings;
    const color = paint(line.hue);
    context.strokeStyle = color;
    context.fillStyle = color;
    const stroke = (values) => strokeLine(context, series.x, values, span, toX, toY, width);
    const thick = line.emphasized ? 2.4 * ratio : thin;
    if (series.low) {
      const edges = line.edges(series, smoothing);
      context.globalAlpha = 0.18;
      fillBand(context, series.x, edges.low, edges.high, span, toX, toY);
    } else {
      context.lineWidth = smoothing > 0 ? 1 : thick;
      context.globalAlpha = smoothing > 0 ? (this.lines.length > 1 ? 0.14 : 0.28) : 1;
      context.setLineDash(smoothing > 0 || !line.dash ? [] : line.dash);
      stroke(series.y);
      context.globalAlpha = 1;
      markOutliers(context, series.x, series.y, span, box.y, toX, plot.bbox);
    }
    context.globalAlpha = 1;
    if (smoothing > 0 || series.low) {
      context.lineWidth = Math.max(thick, 1.4 * ratio);
      context.setLineDash(line.dash || []);
      stroke(smoothing > 0 ? line.average(series, smoothing) : series.y);
    }
    context.setLineDash([]);
    context.fillStyle = cssColor("--bad");
    markNonFinite(context, series.nonfinite, box.x[0], box.x[1], toX, plot.bbox);
  }

  inDrawingOrder() {
    const lines = this.drawn.filter((line) => !line.hidden && line.loaded);
    return lines.sort((a, b) => Number(a.emphasized || 0) - Number(b.emphasized || 0));
  }

  // What the chart holds, for tests and for the curious in the console.
  snapshot() {
    return {
      metric: this.metric,
      x: this.settings.x,
      built: this.plot !== null,
      draws: this.draws || 0,
      view: this.view && { ...this.view },
      axes: { x: [...this.box.x], y: [...this.box.y] },
      log: { x: this.settings.logX, y: this.settings.logY },
      title: this.title,
      lines: this.drawn.map((line) => {
        const series = line.shown(this.view);
        const average = this.settings.smoothing > 0 && line.average(series, this.settings.smoothing);
        return {
          run: line.run,
          label: line.label,
          color: paint(line.hue),
          band: series.low && { low: [...series.low], high: [...series.high] },
          hidden: line.hidden,
          x: [...series.x],
          y: [...series.y],
          smoothed: average ? [...average] : null,
          count: series.count,
          sampled: series.sampled,
          nonfinite: series.nonfinite,
        };
      }),
    };
  }

  formatX(value) {
    const kind = X_KINDS[this.settings.x];
    return kind ? kind.format(value) : `${this.settings.x} ${formatNumber(value)}`;
  }
}
