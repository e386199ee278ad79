// Several runs over each other: charts, a table with the best values and differences, and how the
// configuration relates to what came out.

import { listLink, readAddress, runLink, tagQuery, writeAddress } from "./address.js";
import { ApiSource, subscribe } from "./api.js";
import { ChartBoard } from "./chart_board.js";
import { swatch } from "./chart_readout.js";
import { hueOf } from "./colors.js";
import { ParallelView, ScatterView } from "./scatter.js";
import { debounce, el, fail, replaceContent, reporting } from "./dom.js";
import { bindKeys, moveFocus } from "./keys.js";
import { fillHeader } from "./page_header.js";
import { bestValues, columnPicker, defaultColumns, headerRow, runRow, valueColumns } from "./run_table.js";
import { statusPill } from "./status.js";
import { tabList } from "./tabs.js";

const AT_ONCE = 500;

class ComparePage {
  constructor(ids) {
    this.ids = ids;
    this.source = new ApiSource();
    this.main = document.getElementById("main");
    this.hidden = new Set();
    this.runs = [];
    const { sort, columns, baseline } = readAddress();
    Object.assign(this, { sort: sort || "", chosen: columns ? columns.split("~") : null, baseline });
  }

  async start() {
    fillHeader([["Runs", listLink()], ["Compare"]]);
    if (!this.ids.length) return this.refuse("Choose runs in the list first.");
    this.runs = await this.fetch(this.ids);
    if (!this.runs.length) return this.refuse("None of these runs is there.");
    const missing = this.ids.filter((id) => !this.runs.some((run) => run.run === id));
    if (missing.length) fail(new Error(`There is no run ${missing.join(", ")}.`));
    this.legend = el("aside", { class: "legend", "aria-label": "Runs" });
    this.table = el("section", { "aria-label": "Table of the runs" });
    const views = { scatter: new ScatterView(this), parallel: new ParallelView(this) };
    this.views = Object.values(views);
    this.tabs = tabList(
      [
        { id: "charts", label: "Charts", build: () => this.charts() },
        { id: "table", label: "Table", build: () => (this.fillTable(), this.table) },
        { id: "scatter", label: "Scatter", build: () => views.scatter.root },
        { id: "parallel", label: "Parallel", build: () => views.parallel.root },
      ],
      "Comparison",
    );
    this.fillLegend();
    replaceContent(
      this.main,
      el("h1", { class: "offscreen" }, "Comparison of runs"),
      el("div", { class: "compare" }, this.legend, el("div", { class: "compare-main" }, this.tabs.bar, this.tabs.panel)),
    );
    this.tabs.open(location.hash.slice(1), false);
    subscribe(undefined, (kind, data) => this.onEvent(kind, data), () => this.board?.reload());
    bindKeys({
      "/": ["filter charts", () => document.querySelector(".board-toolbar input")?.focus()],
      j: ["next chart", () => moveFocus(".chart-body", 1)],
      k: ["chart before", () => moveFocus(".chart-body", -1)],
      a: ["add a run", () => this.adding.focus()],
      Escape: ["show all of the charts", () => this.board?.setView(null, null)],
    });
    return undefined;
  }

  refuse(text) {
    replaceContent(this.main, el("div", { class: "empty" }, el("h2", {}, text), el("a", { href: listLink() }, "All runs")));
  }

  // The runs of these ids, in that order, each as the list tells of it with what `columns` name.
  async fetch(ids, options = {}) {
    const runs = [];
    for (let start = 0; start < ids.length; start += AT_ONCE) {
      const asked = { ids: ids.slice(start, start + AT_ONCE).join(","), limit: AT_ONCE, ...options };
      const answer = await this.source.runs(asked);
      runs.push(...answer.runs);
      if (answer.metrics) this.names = answer;
    }
    const place = new Map(ids.map((id, index) => [id, index]));
    return options.sort ? runs : runs.sort((a, b) => place.get(a.run) - place.get(b.run));
  }

  charts() {
    const { project } = this.runs[0];
    this.board = new ChartBoard(this.source, { key: "compare", project, runs: this.runs.map(boardRun) });
    for (const run of this.hidden) this.board.setHidden(run, true);
    return this.board.root;
  }

  // ---- the legend: show, hide, colour, add and remove

  fillLegend() {
    const all = el("button", { type: "button", class: "link", onclick: () => this.toggleAll() }, "all / none");
    const words = el("datalist", { id: "runs-to-add" });
    this.adding = el("input", {
      type: "search", list: "runs-to-add", placeholder: "Add a run", "aria-label": "Add a run",
      oninput: debounce(() => this.suggest(words), 150),
      onchange: () => this.add(this.adding.value),
    });
    const head = el("div", { class: "legend-head" }, el("strong", {}, `${this.runs.length} runs`), all);
    const items = el("ul", {}, this.runs.map((run) => this.legendItem(run)));
    replaceContent(this.legend, head, this.adding, words, items);
  }

  legendItem(run) {
    const shown = !this.hidden.has(run.run);
    const box = el("input", { type: "checkbox", checked: shown, onchange: () => this.toggle(run.run, !box.checked), "aria-label": `Show ${run.name}` });
    const color = el("input", { type: "color", value: hueOf(run)[0], "aria-label": `Colour of ${run.name}`, onchange: () => this.recolor(run, color.value) });
    return el(
      "li",
      { class: shown ? "" : "off", data: { run: run.run }, onmouseenter: () => this.board?.emphasize(run.run), onmouseleave: () => this.board?.emphasize(null) },
      box,
      el("label", { class: "color", title: "Choose a colour" }, swatch(hueOf(run)), color),
      el("a", { href: runLink(run.run), title: `${run.project} / ${run.name}` }, run.name),
      statusPill(run.status),
      el("button", { type: "button", class: "icon-button", "aria-label": `Remove ${run.name}`, title: "Remove from the comparison", onclick: () => this.removeRun(run) }, "✕"),
    );
  }

  recolor = reporting(async (run, color) => {
    await this.source.change([run.run], { color });
    run.color = color;
    this.board?.recolor(run.run, hueOf(run));
    this.changed();
  });

  async suggest(words) {
    const text = this.adding.value.trim();
    const { runs } = await this.source.runs({ q: text && `"${text.replaceAll('"', "")}"`, limit: 20, column: ["-"] }).catch(() => ({ runs: [] }));
    if (text !== this.adding.value.trim()) return; // there is another question by now
    this.found = runs.filter((run) => !this.ids.includes(run.run));
    replaceContent(words, this.found.map((run) => el("option", { value: run.run }, `${run.project} / ${run.name}`)));
  }

  async add(text) {
    const found = (this.found || []).find((run) => run.run === text || run.name === text);
    if (!found) return;
    const [run] = await this.fetch([found.run]);
    this.ids.push(run.run);
    this.runs.push(run);
    this.board?.addRun(boardRun(run));
    this.changed();
  }

  removeRun(run) {
    this.ids = this.ids.filter((id) => id !== run.run);
    this.runs = this.runs.filter((other) => other !== run);
    this.hidden.delete(run.run);
    this.board?.removeRun(run.run);
    this.changed();
  }

  // The list of runs, or how they look, is another.
  changed() {
    writeAddress({ runs: this.ids.join(",") });
    this.fillLegend();
    if (this.table.firstChild) this.fillTable();
    for (const view of this.views) view.refresh();
  }

  toggle(id, hidden) {
    if (hidden) this.hidden.add(id);
    else this.hidden.delete(id);
    this.legend.querySelector(`li[data-run="${CSS.escape(id)}"]`)?.classList.toggle("off", hidden);
    this.board?.setHidden(id, hidden);
  }

  toggleAll() {
    const hide = this.hidden.size === 0;
    for (const run of this.runs) this.toggle(run.run, hide);
    this.fillLegend();
  }

  // ---- the table

  get columns() {
    return this.chosen || defaultColumns(this.names, this.runs).filter((key) => !["status", "created", "project", "notes"].includes(key));
  }

  fillTable = reporting(async (changes = {}) => {
    Object.assign(this, changes);
    writeAddress({ sort: this.sort, baseline: this.baseline, columns: this.chosen?.join("~") });
    if (!this.names) await this.fetch(this.ids, { names: "true", column: ["-"] });
    const turn = (this.turn = {});
    const runs = await this.fetch(this.ids, { column: valueColumns(this.columns).concat("-"), names: "true", sort: this.sort });
    if (turn === this.turn) this.renderTable(runs); // else another sort or column was chosen meanwhile
  });

  renderTable(runs) {
    const table = { columns: this.columns, names: this.names };
    const picker = this.picker || (this.picker = columnPicker(() => this, (columns) => this.fillTable({ chosen: columns })));
    const best = bestValues(runs, table.columns, this.names);
    const baseline = runs.find((run) => run.run === this.baseline);
    const act = { patch: async (run, changes) => (await this.source.change([run.run], changes), this.fillTable()), pickTag: (tag) => location.assign(listLink({ q: tagQuery(tag) })) };
    const rows = runs.map((run) => {
      const choose = () => this.fillTable({ baseline: run === baseline ? "" : run.run });
      const actions = el("button", { type: "button", class: "link", "aria-pressed": String(run === baseline), onclick: choose }, run === baseline ? "no baseline" : "baseline");
      return runRow(run, table, { act, actions, best, baseline });
    });
    replaceContent(
      this.table,
      el("div", { class: "toolbar" }, picker, el("span", { class: "quiet" }, "★ best of a column · “baseline” at a row's end shows differences to it")),
      el("div", { class: "table-scroll" }, el("table", { class: "runs compared" }, el("thead", {}, headerRow(table, { sort: this.sort, onsort: (sort) => this.fillTable({ sort }) })), el("tbody", {}, rows))),
    );
  }

  onEvent(kind, data) {
    if (kind === "metrics") this.board?.update(data.run, data.metrics.filter((name) => !name.startsWith("system/")), data.last_step);
  }
}

function boardRun(run) {
  const metrics = Object.keys(run.summary).filter((name) => !name.startsWith("system/"));
  return { ...run, label: run.name, hue: hueOf(run), metrics };
}

new ComparePage([...new Set((readAddress().runs || "").split(",").filter(Boolean))]).start();
