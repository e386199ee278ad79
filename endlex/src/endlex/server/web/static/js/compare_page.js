// Several runs over each other: charts, the configuration keys that differ, and their figures.

import { ApiSource, subscribe } from "./api.js";
import { ChartBoard } from "./chart_board.js";
import { swatch } from "./chart_readout.js";
import { assignColors } from "./colors.js";
import { configDiff, summaryTable } from "./compare_tables.js";
import { el, fail, replaceContent } from "./dom.js";
import { fillHeader } from "./page_header.js";
import { statusPill } from "./status.js";
import { tabList } from "./tabs.js";

const MOST = 50;

class ComparePage {
  constructor(ids) {
    this.ids = ids;
    this.source = new ApiSource();
    this.main = document.getElementById("main");
    this.hidden = new Set();
    fillHeader([["Runs", "/"], [`Compare ${ids.length}`]]);
  }

  async start() {
    if (!this.ids.length) return this.refuse("Choose runs in the list first.");
    const answers = await Promise.allSettled(this.ids.map((id) => this.source.run(id)));
    this.runs = answers.filter((answer) => answer.status === "fulfilled").map((answer) => answer.value);
    for (const answer of answers) if (answer.status === "rejected") fail(answer.reason);
    if (!this.runs.length) return this.refuse("None of these runs is there.");
    this.places = assignColors(this.runs.map((run) => run.run));
    this.legend = el("aside", { class: "legend", "aria-label": "Runs" });
    this.tabs = tabList(
      [
        { id: "charts", label: "Charts", build: () => this.charts() },
        { id: "config", label: "Config diff", build: () => configDiff(this.runs, this.places) },
        { id: "summary", label: "Summary", build: () => summaryTable(this.runs, this.places) },
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
    return undefined;
  }

  refuse(text) {
    replaceContent(this.main, el("div", { class: "empty" }, el("h2", {}, text), el("a", { href: "/" }, "All runs")));
  }

  charts() {
    const runs = this.runs.map((run) => ({
      run: run.run,
      label: run.name,
      place: this.places.get(run.run),
      created: run.created,
      metrics: run.metrics.map((metric) => metric.name).filter((name) => !name.startsWith("system/")),
    }));
    this.board = new ChartBoard(this.source, { key: "compare", runs });
    for (const run of this.hidden) this.board.setHidden(run, true);
    return this.board.root;
  }

  fillLegend() {
    const all = el("button", { type: "button", class: "link", onclick: () => this.toggleAll() }, "all / none");
    replaceContent(
      this.legend,
      el("div", { class: "legend-head" }, el("strong", {}, `${this.runs.length} runs`), all),
      el("ul", {}, this.runs.map((run) => this.legendItem(run))),
    );
  }

  legendItem(run) {
    const shown = !this.hidden.has(run.run);
    const box = el("input", { type: "checkbox", checked: shown, onchange: () => this.toggle(run.run, !box.checked), "aria-label": `Show ${run.name}` });
    return el(
      "li",
      { class: shown ? "" : "off", data: { run: run.run }, onmouseenter: () => this.board?.emphasize(run.run), onmouseleave: () => this.board?.emphasize(null) },
      box,
      swatch(this.places.get(run.run)),
      el("a", { href: `/runs/${encodeURIComponent(run.run)}`, title: `${run.project} / ${run.name}` }, run.name),
      statusPill(run.status),
    );
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

  onEvent(kind, data) {
    if (kind === "metrics") this.board?.update(data.run, data.metrics.filter((name) => !name.startsWith("system/")), data.last_step);
  }
}

const asked = (new URLSearchParams(location.search).get("runs") || "").split(",").filter(Boolean);
new ComparePage([...new Set(asked)].slice(0, MOST)).start();
