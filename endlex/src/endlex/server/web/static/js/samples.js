// Texts, tables, pictures, sound and video logged at steps: a slider over the steps, and every name's
// latest up to there.

import { download, el, replaceContent, reporting } from "./dom.js";
import { compareText, formatBytes, formatCsv, formatDate, formatInteger, formatNumber, formatValue } from "./format.js";
import { svg } from "./svg.js";

const PAGE = 200;
const ROWS = 500;

class StepViewer {
  // `load(options)` answers records, whole steps of them, newest first; `show(record)` makes a record's content.
  constructor({ load, show, what }) {
    Object.assign(this, { load, show, what });
    this.records = [];
    this.step = null;
    this.name = "";
    this.slider = el("input", { type: "range", min: "0", max: "0", step: "1", class: "step-slider", "aria-label": "Step", oninput: () => this.moved() });
    this.number = el("output", { class: "slider-value" });
    this.names = el("select", { "aria-label": `Which ${what}`, onchange: () => ((this.name = this.names.value), this.render()) });
    this.older = el("button", { type: "button", class: "button", onclick: () => this.refresh(this.records[0]?.step) }, "Load older");
    this.list = el("div", { class: "records" });
    this.controls = el("div", { class: "toolbar" }, el("label", { class: "field grow" }, "step", this.slider, this.number), this.names, this.older);
    this.root = el("section", { "aria-label": what }, this.controls, this.list);
    this.refresh();
  }

  // Loads the latest records, or those before a step.
  refresh = reporting(async (before_step) => {
    const fresh = await this.load({ before_step, limit: PAGE });
    this.merge(fresh);
    this.older.hidden ||= fresh.length < PAGE;
    this.render();
  });

  merge(fresh) {
    const following = this.step === null || this.step === this.steps?.at(-1);
    const known = new Map(this.records.map((record) => [`${record.step}|${record.name}`, record]));
    for (const record of fresh) known.set(`${record.step}|${record.name}`, record);
    this.records = [...known.values()].sort((a, b) => a.step - b.step || compareText(a.name, b.name));
    this.steps = [...new Set(this.records.map((record) => record.step))];
    if (following) this.step = this.steps.at(-1) ?? null;
    this.slider.max = String(Math.max(0, this.steps.length - 1));
    this.slider.value = String(Math.max(0, this.steps.indexOf(this.step)));
    const names = [...new Set(this.records.map((record) => record.name))].sort(compareText);
    const options = names.map((name) => el("option", { value: name, selected: name === this.name }, name));
    replaceContent(this.names, el("option", { value: "" }, `all ${names.length} ${this.what}`), options);
  }

  moved() {
    this.step = this.steps[Number(this.slider.value)];
    this.render();
  }

  render() {
    const some = this.records.length > 0;
    this.controls.hidden = !some;
    if (!some) return replaceContent(this.list, el("p", { class: "quiet pad" }, `No ${this.what} yet.`));
    this.number.textContent = formatInteger(this.step);
    this.slider.setAttribute("aria-valuetext", `step ${this.step}`);
    const latest = new Map();
    for (const record of this.records) {
      if (record.step <= this.step && (!this.name || record.name === this.name)) latest.set(record.name, record);
    }
    const shown = [...latest.values()].sort((a, b) => compareText(a.name, b.name));
    return replaceContent(this.list, shown.map((record) => this.card(record)));
  }

  card(record) {
    const old = record.step !== this.step;
    return el(
      "article",
      { class: "record", data: { name: record.name } },
      el("header", {}, el("h3", {}, record.name), el("span", { class: "quiet", title: formatDate(record.time) }, `step ${formatInteger(record.step)}${old ? " (latest before)" : ""}`)),
      this.show(record),
    );
  }
}

export function samplesView(source, run) {
  return new StepViewer({
    what: "samples",
    load: (options) => source.records("texts", run, options),
    show: (record) => el("pre", { class: "sample" }, record.text),
  });
}

export function tablesView(source, run) {
  const states = new Map(); // how each name is sorted and filtered, from step to step
  const stateOf = (name) => states.get(name) || states.set(name, { sort: null, down: false, filter: "" }).get(name);
  return new StepViewer({
    what: "tables",
    load: (options) => source.records("tables", run, options),
    show: (record) => (isHistogram(record) ? histogram(record) : table(record, stateOf(record.name))),
  });
}

export function mediaView(source, run) {
  return new StepViewer({
    what: "media",
    load: (options) => source.records("media", run, options),
    show: (record) => showMedia(source.mediaUrl(run, record.id), record),
  });
}

function showMedia(url, { name, mime, bytes, caption }) {
  const kind = mime.split("/")[0];
  const link = el("a", { href: url, download: name }, `${mime}, ${formatBytes(bytes)}`);
  const shown = {
    image: () => el("a", { href: url, target: "_blank" }, el("img", { class: "media", src: url, alt: caption || name, loading: "lazy" })),
    audio: () => el("audio", { src: url, controls: true, preload: "none" }),
    video: () => el("video", { class: "media", src: url, controls: true, preload: "metadata" }),
  }[kind];
  return el("figure", {}, mime !== "image/svg+xml" && shown?.(), el("figcaption", { class: "quiet" }, caption && `${caption} · `, link));
}

// A table that is sorted by its heads, filtered and downloaded.
function table({ name, step, columns = [], rows = [] }, state) {
  const [head, body, note] = [el("tr"), el("tbody"), el("span", { class: "quiet" })];
  const matches = (row) => row.some((value) => formatValue(value).toLowerCase().includes(state.filter.toLowerCase()));
  const chosen = () => {
    const found = state.filter ? rows.filter(matches) : [...rows];
    if (state.sort === null) return found;
    const sign = state.down ? -1 : 1;
    return found.sort(([...a], [...b]) => sign * compareValues(a[state.sort], b[state.sort]));
  };
  const sortBy = (index) => {
    state.down = state.sort === index && !state.down;
    state.sort = index;
    fill();
  };
  const fill = () => {
    const found = chosen();
    const arrow = (index) => (state.sort === index ? (state.down ? " ↓" : " ↑") : "");
    replaceContent(head, columns.map((column, index) => el("th", { scope: "col" }, el("button", { type: "button", class: "sort", onclick: () => sortBy(index) }, String(column) + arrow(index)))));
    replaceContent(body, found.slice(0, ROWS).map((row) => el("tr", {}, row.map((value) => el("td", { class: typeof value === "number" ? "number" : "" }, formatValue(value))))));
    note.textContent = found.length > ROWS ? `the first ${ROWS} of ${formatInteger(found.length)} rows` : `${formatInteger(found.length)} rows`;
  };
  const filter = el("input", { type: "search", placeholder: "Filter rows", value: state.filter, "aria-label": `Filter ${name}`, oninput: () => ((state.filter = filter.value), fill()) });
  const csv = () => formatCsv([columns, ...chosen()].map((row) => row.map(formatValue)));
  const save = el("button", { type: "button", class: "button", onclick: () => download(`${name.replaceAll("/", "-")}-${step}.csv`, csv(), "text/csv") }, "CSV");
  fill();
  return [el("div", { class: "toolbar" }, filter, save, note), el("div", { class: "table-scroll" }, el("table", { class: "plain" }, el("thead", {}, head), body))];
}

function compareValues(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : compareText(formatValue(a), formatValue(b));
}

// `log_histogram` writes tables of these columns.
function isHistogram({ columns = [], rows = [] }) {
  return rows.length > 0 && columns.join() === "low,high,count";
}

function histogram({ name, rows }) {
  const [width, height] = [600, 140];
  const [low, high] = [rows[0][0], rows[rows.length - 1][1]];
  const most = Math.max(...rows.map(([, , count]) => count), 1);
  const x = (value) => ((value - low) / (high - low || 1)) * width;
  const bars = rows.map(([from, to, count]) =>
    svg("rect", { x: x(from), y: height - (count / most) * height, width: Math.max(0.5, x(to) - x(from) - 0.5), height: (count / most) * height, class: "bar" }, svg("title", {}, `${formatNumber(from)} to ${formatNumber(to)}: ${formatNumber(count)}`)),
  );
  const ends = [[0, "start", low], [width, "end", high]].map(([at, anchor, value]) => svg("text", { x: at, y: height + 15, "text-anchor": anchor }, formatNumber(value)));
  return el("div", { class: "picture" }, svg("svg", { viewBox: `0 -4 ${width} ${height + 24}`, role: "img", "aria-label": `Histogram ${name}` }, bars, ends));
}
