// Texts and tables logged at steps: a slider over the steps, and every name's latest up to there.

import { el, fail, replaceContent } from "./dom.js";
import { compareText, formatDate, formatInteger, formatValue } from "./format.js";

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
    this.older = el("button", { type: "button", class: "button", hidden: true, onclick: () => this.more() }, "Load older");
    this.list = el("div", { class: "records" });
    this.controls = el("div", { class: "toolbar" }, el("label", { class: "field grow" }, "step", this.slider, this.number), this.names, this.older);
    this.root = el("section", { "aria-label": what }, this.controls, this.list);
    this.refresh();
  }

  async refresh() {
    try {
      const fresh = await this.load({ limit: PAGE });
      this.merge(fresh);
      this.older.hidden = this.exhausted || fresh.length < PAGE;
      this.render();
    } catch (error) {
      fail(error);
    }
  }

  async more() {
    try {
      const first = Math.min(...this.records.map((record) => record.step));
      const fresh = await this.load({ before_step: first, limit: PAGE });
      this.merge(fresh);
      this.exhausted = fresh.length < PAGE;
      this.older.hidden = this.exhausted;
      this.render();
    } catch (error) {
      fail(error);
    }
  }

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
    replaceContent(
      this.names,
      el("option", { value: "" }, `all ${names.length} ${this.what}`),
      names.map((name) => el("option", { value: name, selected: name === this.name }, name)),
    );
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
    load: (options) => source.texts(run, options).then((answer) => answer.texts),
    show: (record) => el("pre", { class: "sample" }, record.text),
  });
}

export function tablesView(source, run) {
  return new StepViewer({
    what: "tables",
    load: (options) => source.tables(run, options).then((answer) => answer.tables),
    show: showTable,
  });
}

function showTable({ columns = [], rows = [] }) {
  const head = el("tr", {}, columns.map((name) => el("th", { scope: "col" }, String(name))));
  const body = rows.slice(0, ROWS).map((row) => el("tr", {}, row.map((value) => el("td", { class: typeof value === "number" ? "number" : "" }, formatValue(value)))));
  return el(
    "div",
    { class: "table-scroll" },
    el("table", { class: "plain" }, el("thead", {}, head), el("tbody", {}, body)),
    rows.length > ROWS && el("p", { class: "quiet" }, `${formatInteger(rows.length - ROWS)} more rows: export the run to see them.`),
  );
}
