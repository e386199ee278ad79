// Charts of many metrics, grouped by the part of the name before the first slash. A chart is built
// while it is on the screen (or nearly), so hundreds of them cost as much as a dozen.

import { Chart } from "./chart.js";
import { ChartLine } from "./chart_data.js";
import { systemDark } from "./colors.js";
import { boardToolbar } from "./chart_toolbar.js";
import { debounce, el, recall, remember, replaceContent } from "./dom.js";
import { compareText } from "./format.js";
import { SeriesLoader } from "./series_loader.js";

const FIRST_GROUPS = ["train", "val", "eval", "core"];
const DEFAULTS = { x: "step", smoothing: 0, logX: false, logY: false, fit: false, pan: false, together: true };
const boards = new Set();

export class ChartBoard {
  // `runs`: [{run, label, place, created, metrics: [names]}]; `key` names the remembered settings.
  constructor(source, { key, runs, settings = {}, xKinds, onreadout }) {
    Object.assign(this, { key, runs, onreadout });
    this.settings = { ...DEFAULTS, ...settings, ...recall(`board.${key}`, {}) };
    this.xKinds = xKinds || this.usableX();
    if (!this.xKinds.includes(this.settings.x)) this.settings.x = this.xKinds[0];
    this.loader = new SeriesLoader(source);
    this.charts = new Map();
    this.hidden = new Set();
    this.filter = "";
    this.collapsed = new Set(recall(`collapsed.${key}`, []));
    this.view = null;
    this.groups = el("div", { class: "chart-groups" });
    this.toolbar = boardToolbar(this);
    this.root = el("section", { class: "board", "aria-label": "Charts" }, this.toolbar, this.groups);
    this.observer = new IntersectionObserver((entries) => this.seen(entries), { rootMargin: "120px" });
    this.resized = new ResizeObserver(debounce(() => this.eachBuilt((chart) => chart.resize()), 80));
    this.resized.observe(this.groups);
    systemDark.addEventListener("change", () => this.repaint());
    addEventListener("endlex:theme", () => this.repaint());
    boards.add(this);
    this.layout();
  }

  usableX() {
    const names = new Set(this.runs.flatMap((run) => run.metrics));
    const others = ["train/tokens", "train/flops"].filter((name) => names.has(name));
    return ["step", "elapsed", "time", ...others];
  }

  get metrics() {
    return [...new Set(this.runs.flatMap((run) => run.metrics))];
  }

  // ---- layout

  layout() {
    const words = this.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const names = this.metrics.filter((name) => words.every((word) => name.toLowerCase().includes(word)));
    const groups = new Map();
    for (const name of names.sort(compareMetrics)) {
      const group = groupOf(name);
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(name);
    }
    const ordered = [...groups].sort(([a], [b]) => rank(a) - rank(b) || compareText(a, b));
    this.observer.disconnect();
    const sections = ordered.map(([group, metrics]) => this.section(group, metrics, words.length > 0));
    const nothing = this.metrics.length ? "No metric has such a name." : "No metrics yet.";
    replaceContent(this.groups, sections.length ? sections : el("p", { class: "quiet pad" }, nothing));
    for (const [name, chart] of this.charts) {
      if (!names.includes(name)) chart.hide();
      else this.observer.observe(chart.root);
    }
  }

  section(group, metrics, forced) {
    const grid = el("div", { class: "chart-grid" }, metrics.map((name) => this.chart(name).root));
    const section = el(
      "details",
      { class: "chart-group", open: forced || !this.collapsed.has(group), data: { group } },
      el("summary", {}, el("h2", {}, group), el("span", { class: "count" }, String(metrics.length))),
      grid,
    );
    section.addEventListener("toggle", () => {
      if (this.filter) return;
      if (section.open) this.collapsed.delete(group);
      else this.collapsed.add(group);
      remember(`collapsed.${this.key}`, [...this.collapsed]);
    });
    return section;
  }

  chart(metric) {
    if (!this.charts.has(metric)) {
      const lines = this.runs
        .filter((run) => run.metrics.includes(metric))
        .map((run) => new ChartLine({ ...run, metric, offset: this.offset(run) }));
      for (const line of lines) line.hidden = this.hidden.has(line.run);
      const chart = new Chart({
        metric,
        title: metric,
        lines,
        loader: this.loader,
        settings: this.settings,
        onview: (from, view) => this.setView(from, view),
      });
      chart.view = this.settings.together ? this.view : null;
      this.charts.set(metric, chart);
    }
    return this.charts.get(metric);
  }

  offset(run) {
    return this.settings.x === "elapsed" ? run.created || 0 : 0;
  }

  seen(entries) {
    for (const { target, isIntersecting } of entries) {
      const chart = this.charts.get(target.dataset.metric);
      if (!chart) continue;
      if (isIntersecting) chart.show();
      else chart.hide();
    }
  }

  eachBuilt(call) {
    for (const chart of this.charts.values()) if (chart.plot) call(chart);
  }

  // ---- what people change

  setView(from, view) {
    if (this.settings.together) this.view = view;
    for (const chart of this.charts.values()) {
      if (chart === from || this.settings.together) chart.setView(view && { ...view }, chart === from);
    }
  }

  change(settings) {
    const sameX = settings.x === undefined || settings.x === this.settings.x;
    const redrawOnly = Object.keys(settings).every((name) => ["smoothing", "fit", "pan", "together"].includes(name));
    Object.assign(this.settings, settings);
    remember(`board.${this.key}`, this.settings);
    if (!sameX) this.changeX();
    else if (redrawOnly) this.eachBuilt((chart) => chart.changed());
    else for (const chart of this.charts.values()) chart.rebuild();
  }

  changeX() {
    this.view = null;
    const created = new Map(this.runs.map((run) => [run.run, run]));
    for (const chart of this.charts.values()) {
      for (const line of chart.lines) line.offset = this.offset(created.get(line.run));
      chart.view = null;
      chart.resetButton.hidden = true;
      chart.rebuild();
    }
  }

  setFilter(text) {
    this.filter = text;
    this.layout();
  }

  setHidden(run, hidden) {
    if (hidden) this.hidden.add(run);
    else this.hidden.delete(run);
    for (const chart of this.charts.values()) {
      for (const line of chart.lines) if (line.run === run) line.hidden = hidden;
      if (chart.plot) {
        chart.data.want(chart.view);
        chart.changed();
      }
    }
  }

  emphasize(run) {
    for (const chart of this.charts.values()) {
      for (const line of chart.lines) line.emphasized = line.run === run;
      if (chart.plot) chart.changed();
    }
  }

  repaint() {
    for (const chart of this.charts.values()) chart.rebuild();
  }

  // ---- what the server reports

  // Answers whether a metric is new to the board.
  update(run, names, lastStep) {
    const known = this.runs.find((item) => item.run === run);
    if (!known) return false;
    const fresh = names.filter((name) => !known.metrics.includes(name));
    if (fresh.length) {
      known.metrics.push(...fresh);
      for (const name of fresh) this.addLine(name, known);
      this.layout();
    }
    for (const name of names) this.charts.get(name)?.refresh(run, lastStep);
    return fresh.length > 0;
  }

  addLine(metric, run) {
    const chart = this.charts.get(metric);
    if (!chart) return;
    const line = new ChartLine({ ...run, metric, offset: this.offset(run) });
    line.hidden = this.hidden.has(run.run);
    chart.lines.push(line);
    if (chart.plot) chart.data.loadWhole();
  }

  // After a gap in the events everything may have changed.
  reload() {
    for (const chart of this.charts.values()) chart.reload();
  }
}

function groupOf(name) {
  const slash = name.indexOf("/");
  return slash > 0 ? name.slice(0, slash) : "other";
}

// Losses first, and counts of what was spent (which only rise) last.
function compareMetrics(left, right) {
  const weight = (name) => (/loss|bpb|core/.test(name) ? 0 : /(tokens|flops|seconds|epoch)$/.test(name) ? 2 : 1);
  return weight(left) - weight(right) || compareText(left, right);
}

function rank(group) {
  const place = FIRST_GROUPS.indexOf(group);
  return place >= 0 ? place : group === "other" ? 99 : FIRST_GROUPS.length;
}

// Read-only: `endlexCharts` is what every chart of the page holds at this moment.
Object.defineProperty(window, "endlexCharts", {
  get: () => [...boards].flatMap((board) => [...board.charts.values()].map((chart) => chart.snapshot())),
});
Object.defineProperty(window, "endlexRequests", {
  get: () => [...boards].map(({ loader }) => ({ sent: loader.requests, cancelled: loader.cancelled })),
});
