// Charts of many metrics, grouped by the part of the name before the first slash, with saved panels
// above them. A chart is built while it is on the screen (or nearly), so hundreds of them cost as much
// as a dozen.

import { readAddress, writeAddress } from "./address.js";
import { Chart } from "./chart.js";
import { ChartLine } from "./chart_data.js";
import { hueAt, systemDark } from "./colors.js";
import { boardToolbar } from "./chart_toolbar.js";
import { debounce, el, recall, remember, replaceContent } from "./dom.js";
import { compareText, configKey, flatten, formatValue } from "./format.js";
import { Panels, metricsOf, panelsSection } from "./panels.js";
import { SeriesLoader } from "./series_loader.js";

const FIRST_GROUPS = ["train", "val", "eval", "core"];
const DEFAULTS = { x: "step", smoothing: 0, logX: false, logY: false, fit: true, pan: false, together: true, groupBy: "", band: "range" };
const OPEN_CHARTS = 60; // in groups that nobody has opened or closed
const DASHES = [null, [7, 4], [2, 3], [9, 3, 2, 3]];
const boards = new Set();

export class ChartBoard {
  // `runs`: [{run, label, hue, number, created, metrics: [names], config, tags, group}]; `key` names the
  // remembered settings; `project` is that of the panels, if there are any.
  constructor(source, { key, runs, project, xKinds }) {
    Object.assign(this, { key, runs, source });
    this.addressed = key !== "system";
    const address = this.addressed ? readAddress() : {};
    this.settings = { ...DEFAULTS, ...recalled(key, address), ...settingsOf(address) };
    this.xKinds = xKinds || this.usableX();
    if (![...this.xKinds, ...this.metrics].includes(this.settings.x)) this.settings.x = this.xKinds[0];
    if (!this.groupings().some(([by]) => by === this.settings.groupBy)) this.settings.groupBy = "";
    if (this.addressed) writeAddress(addressOf(this.settings));
    this.loader = new SeriesLoader(source);
    this.charts = new Map();
    this.panelCharts = [];
    this.roots = new WeakMap();
    this.hidden = new Set();
    this.filter = address.filter || "";
    this.folded = recall(`folded.${key}`, {});
    this.view = viewOf(address.zoom);
    this.groups = el("div", { class: "chart-groups" });
    this.panels = project !== undefined && this.addressed ? new Panels(source, project, () => this.makePanels()) : null;
    this.toolbar = boardToolbar(this);
    this.root = el("section", { class: "board", "aria-label": "Charts" }, this.toolbar, this.groups);
    this.observer = new IntersectionObserver((entries) => this.seen(entries), { rootMargin: "120px" });
    this.resized = new ResizeObserver(debounce(() => this.eachBuilt((chart) => chart.resize()), 80));
    this.resized.observe(this.groups);
    this.saveView = debounce((view) => this.addressed && writeAddress({ zoom: view && [view.from, view.to].map((x) => Number(x.toPrecision(8))).join("~") }), 300);
    systemDark.addEventListener("change", () => this.repaint());
    addEventListener("endlex:theme", () => this.repaint());
    boards.add(this);
    this.layout();
    this.panels?.load();
  }

  usableX() {
    const names = new Set(this.metrics);
    return ["step", "elapsed", "time", ...["train/tokens", "train/flops"].filter((name) => names.has(name))];
  }

  get metrics() {
    return [...new Set(this.runs.flatMap((run) => run.metrics))];
  }

  get every() {
    return [...this.panelCharts, ...this.charts.values()];
  }

  // ---- layout

  layout() {
    const words = patterns(this.filter);
    const names = this.metrics.filter((name) => words.every((word) => word.test(name)));
    const groups = new Map();
    for (const name of names.sort(compareMetrics)) {
      const group = groupOf(name);
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(name);
    }
    const ordered = [...groups].sort(([a], [b]) => rank(a) - rank(b) || compareText(a, b));
    this.observer.disconnect();
    let open = 0;
    const sections = ordered.map(([group, metrics], index) => {
      open += metrics.length;
      return this.section(group, metrics, words.length > 0 || !(this.folded[group] ?? (index > 0 && open > OPEN_CHARTS)));
    });
    const nothing = this.metrics.length ? "No metric has such a name." : "No metrics yet.";
    const panels = this.panelCharts.length > 0 && !words.length && panelsSection(this.panelCharts);
    replaceContent(this.groups, panels, sections.length ? sections : el("p", { class: "quiet pad" }, nothing));
    for (const [name, chart] of this.charts) if (!names.includes(name)) chart.hide();
    for (const chart of this.panelCharts) if (panels) this.observer.observe(chart.root);
    else chart.hide();
  }

  section(group, metrics, open) {
    const grid = el("div", { class: "chart-grid" });
    // A group that is closed has no charts, however many metrics it has.
    const fill = () => {
      if (!grid.children.length) grid.append(...metrics.map((name) => this.chart(name).root));
      for (const name of metrics) this.observer.observe(this.chart(name).root);
    };
    const section = el(
      "details",
      { class: "chart-group", open, data: { group } },
      el("summary", {}, el("h2", {}, group), el("span", { class: "count" }, String(metrics.length))),
      grid,
    );
    if (open) fill();
    section.addEventListener("toggle", () => {
      if (section.open) fill();
      if (this.filter) return;
      this.folded[group] = !section.open;
      remember(`folded.${this.key}`, this.folded);
    });
    return section;
  }

  foldAll() {
    const sections = [...this.groups.querySelectorAll("details")];
    const open = sections.some((section) => section.open);
    for (const section of sections) section.open = !open;
  }

  chart(metric) {
    if (!this.charts.has(metric)) {
      const pin = ["pin", "Pin to the panels", () => this.panels.pin(metric, chart.settings.logY ? { logY: true } : {})];
      const chart = this.makeChart([metric], metric, {}, this.panels && this.source.live ? [pin] : []);
      this.charts.set(metric, chart);
    }
    return this.charts.get(metric);
  }

  makeChart(metrics, title, own, buttons) {
    const lines = this.runs.flatMap((run) => metrics.flatMap((metric) => this.line(run, metric, metrics, own)));
    const onview = (from, view) => this.setView(from, view);
    const chart = new Chart({ metric: metrics[0] ?? title, title, lines, loader: this.loader, settings: this.settings, own, buttons, onview });
    chart.metrics = metrics;
    this.roots.set(chart.root, chart);
    if (this.settings.together) chart.setView(this.view && { ...this.view });
    this.group(chart);
    return chart;
  }

  // The line of one metric of a run: in the run's colour, dashed where it is not the first; of a single
  // run, each metric in a colour of its own. None where the run has no such metric.
  line(run, metric, metrics, own = {}) {
    if (!run.metrics.includes(metric)) return [];
    const index = metrics.indexOf(metric);
    const single = this.runs.length === 1;
    const label = metrics.length === 1 ? run.label : single ? metric : `${run.label} · ${metric}`;
    const hue = single && index ? hueAt(run.number + index) : run.hue;
    const dash = single ? null : DASHES[index % DASHES.length];
    const line = new ChartLine({ run: run.run, metric, label, hue, dash, offset: this.offset(run, own.x) });
    line.hidden = this.hidden.has(run.run);
    return [line];
  }

  offset(run, x = this.settings.x) {
    return x === "elapsed" ? run.created || 0 : 0;
  }

  makePanels() {
    for (const chart of this.panelCharts) chart.hide();
    this.panelCharts = this.panels.list.map((panel) => {
      const metrics = metricsOf(panel, this.metrics);
      const edit = () => this.panels.edit(this.metrics, this.xKinds, panel);
      const buttons = this.source.live ? this.panels.buttons(panel, edit) : [];
      const chart = this.makeChart(metrics, panel.title || panel.metrics.join(", "), panel, buttons);
      chart.root.classList.add("panel-chart");
      if (!metrics.length) chart.note.textContent = "These runs have no such metric.";
      if (this.source.live) this.panels.makeDraggable(chart.root, panel);
      return chart;
    });
    this.layout();
  }

  seen(entries) {
    for (const { target, isIntersecting } of entries) this.roots.get(target)?.[isIntersecting ? "show" : "hide"]();
  }

  eachBuilt(call) {
    for (const chart of this.every) if (chart.plot) call(chart);
  }

  eachLine(change) {
    for (const chart of this.every) chart.lines.forEach(change);
    this.eachBuilt((chart) => chart.changed());
  }

  // ---- what people change

  setView(from, view) {
    if (this.settings.together) {
      this.view = view;
      this.saveView(view);
    }
    for (const chart of this.every) {
      if (chart === from || this.settings.together) chart.setView(view && { ...view }, chart === from);
    }
  }

  change(settings) {
    const sameX = settings.x === undefined || settings.x === this.settings.x;
    const redrawOnly = Object.keys(settings).every((name) => ["smoothing", "fit", "pan", "together"].includes(name));
    Object.assign(this.settings, settings);
    remember(`board.${this.key}`, this.settings);
    if (this.addressed) writeAddress(addressOf(this.settings));
    if (!sameX) this.changeX();
    else if ("groupBy" in settings || "band" in settings) for (const chart of this.every) this.group(chart);
    else if (redrawOnly) this.eachBuilt((chart) => chart.changed());
    else for (const chart of this.every) chart.rebuild();
  }

  changeX() {
    this.view = null;
    this.saveView(null);
    const known = new Map(this.runs.map((run) => [run.run, run]));
    for (const chart of this.every) {
      for (const line of chart.lines) line.offset = this.offset(known.get(line.run), chart.settings.x);
      chart.setView(null);
      chart.rebuild();
    }
  }

  // What runs can be grouped by: [key, words].
  groupings() {
    const differing = variedKeys(this.runs).sort(compareText).map((key) => [`config.${key}`, key]);
    return [["", "no groups"], ["group", "group"], ["tags", "tags"], ...differing];
  }

  group(chart) {
    const { groupBy, band } = this.settings;
    const labels = new Map(this.runs.map((run) => [run.run, groupBy && labelOf(run, groupBy)]));
    const order = [...new Set(labels.values())].sort(compareText);
    chart.setGroups(groupBy ? (run) => labels.get(run) : null, band, (label) => hueAt(order.indexOf(label)));
  }

  setFilter(text) {
    this.filter = text;
    if (this.addressed) writeAddress({ filter: text });
    this.layout();
  }

  setHidden(run, hidden) {
    if (hidden) this.hidden.add(run);
    else this.hidden.delete(run);
    this.eachLine((line) => line.run === run && Object.assign(line, { hidden }));
    this.eachBuilt((chart) => chart.data.want(chart.view));
  }

  emphasize(run) {
    this.eachLine((line) => (line.emphasized = line.run === run));
  }

  recolor(run, hue) {
    this.runs.find((known) => known.run === run).hue = hue;
    this.eachLine((line) => line.run === run && Object.assign(line, { hue }));
  }

  repaint() {
    for (const chart of this.every) chart.rebuild();
  }

  addRun(run) {
    this.runs.push(run);
    for (const chart of this.every) this.addLines(chart, run, chart.metrics);
    this.layout();
  }

  removeRun(id) {
    this.runs = this.runs.filter((run) => run.run !== id);
    for (const chart of this.every) chart.removeRun(id);
    this.layout();
  }

  addLines(chart, run, metrics) {
    for (const metric of metrics) for (const line of this.line(run, metric, chart.metrics, chart.settings)) chart.addLine(line);
    if (chart.grouping) this.group(chart);
  }

  // ---- what the server reports

  // Answers whether a metric is new to the board.
  update(run, names, lastStep) {
    const known = this.runs.find((item) => item.run === run);
    if (!known) return false;
    const fresh = names.filter((name) => !known.metrics.includes(name));
    if (fresh.length) {
      known.metrics.push(...fresh);
      for (const name of fresh) if (this.charts.has(name)) this.addLines(this.charts.get(name), known, [name]);
      if (this.panelCharts.length) this.makePanels();
      else this.layout();
    }
    for (const chart of this.every) if (chart.metrics.some((name) => names.includes(name))) chart.refresh(run, lastStep);
    return fresh.length > 0;
  }

  // After a gap in the events everything may have changed.
  reload() {
    for (const chart of this.every) chart.reload();
  }
}

// ---- the address: x, smooth, log (x, y or xy), fit, group, band and zoom

const IN_ADDRESS = ["x", "smooth", "log", "fit", "group", "band", "zoom", "filter"];
const OF_THE_HAND = ["pan", "together"];

// What this browser remembers. A shared address that says anything about the charts shows them as they
// were, and only how they are moved stays one's own.
function recalled(key, address) {
  const shared = IN_ADDRESS.some((name) => name in address);
  const known = Object.entries(recall(`board.${key}`, {}));
  return Object.fromEntries(known.filter(([name]) => !shared || OF_THE_HAND.includes(name)));
}

function settingsOf({ x, smooth, log, fit, group, band }) {
  const given = { x, groupBy: group, band };
  if (smooth !== undefined && Number(smooth) >= 0) given.smoothing = Math.min(0.999, Number(smooth));
  if (log !== undefined) Object.assign(given, { logX: log.includes("x"), logY: log.includes("y") });
  if (fit !== undefined) given.fit = fit !== "all";
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined));
}

function addressOf({ x, smoothing, logX, logY, fit, groupBy, band }) {
  return {
    x: x === DEFAULTS.x ? "" : x,
    smooth: smoothing ? String(Number(smoothing.toFixed(4))) : "",
    log: (logX ? "x" : "") + (logY ? "y" : ""),
    fit: fit ? "" : "all",
    group: groupBy,
    band: band === DEFAULTS.band ? "" : band,
  };
}

function viewOf(zoom) {
  const [from, to] = (zoom || "").split("~").map(Number);
  return from < to ? { from, to } : null;
}

// The words of a filter, each a regular expression; one that is none is taken as it is.
function patterns(text) {
  return text.split(/\s+/).filter(Boolean).map((word) => {
    try {
      return new RegExp(word, "i");
    } catch {
      return new RegExp(word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "i");
    }
  });
}

// The configuration's keys that the runs do not all have the same value of.
function variedKeys(runs) {
  const configs = runs.map((run) => new Map(flatten(run.config || {})));
  const keys = new Set(configs.flatMap((config) => [...config.keys()]));
  return [...keys].filter((key) => new Set(configs.map((config) => formatValue(config.get(key)))).size > 1);
}

function labelOf(run, key) {
  if (key === "group") return run.group || "no group";
  if (key === "tags") return (run.tags || []).join(", ") || "no tags";
  const name = configKey(key);
  return `${name} = ${formatValue(new Map(flatten(run.config || {})).get(name))}`;
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
  get: () => [...boards].flatMap((board) => board.every.map((chart) => chart.snapshot())),
});
Object.defineProperty(window, "endlexRequests", {
  get: () => [...boards].map(({ loader }) => ({ sent: loader.requests, cancelled: loader.cancelled })),
});
