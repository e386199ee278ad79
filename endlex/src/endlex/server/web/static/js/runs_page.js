// The list of runs: search, sort, edit in place, archive, delete with undo, choose and compare.

import { query, request, runPath, subscribe } from "./api.js";
import { assignColors } from "./colors.js";
import { debounce, el, fail, recall, remember, replaceContent, throttle, toast } from "./dom.js";
import { fillHeader } from "./page_header.js";
import { columnsFor, defaultMetrics, headerRow, metricNames, runRow, sortRuns } from "./run_table.js";

const PAGE = 500;
const HELP = "Words, tag:name, project:name and conditions such as val/bpb<0.9, all of which must hold";

class RunsPage {
  constructor() {
    const address = new URLSearchParams(location.search);
    this.q = address.get("q") || "";
    this.archived = address.get("archived") === "true";
    this.limit = PAGE;
    this.selected = new Set();
    this.runs = [];
    this.total = 0;
    this.metrics = recall("list.metrics", null);
    Object.assign(this, recall("list.sort", { sort: "created", descending: true }));
    this.build();
  }

  build() {
    fillHeader([["Runs"]]);
    this.search = el("input", {
      type: "search", class: "search", value: this.q, placeholder: "Search: d12 tag:good val/bpb<0.9", title: HELP, "aria-label": `Search runs. ${HELP}`,
      oninput: debounce(() => this.setQuery(this.search.value), 200),
    });
    const archived = el("input", { type: "checkbox", checked: this.archived, onchange: () => ((this.archived = archived.checked), this.load()) });
    this.compare = el("button", { type: "button", class: "button primary", onclick: () => this.openCompare() });
    this.picker = el("details", { class: "picker" });
    this.count = el("span", { class: "quiet", role: "status" });
    this.head = el("thead");
    this.body = el("tbody");
    this.more = el("button", { type: "button", class: "button", hidden: true, onclick: () => ((this.limit += PAGE), this.load()) }, "Show more");
    this.empty = el("div", { class: "empty", hidden: true });
    replaceContent(
      document.getElementById("main"),
      el("h1", { class: "offscreen" }, "Runs"),
      el("div", { class: "toolbar list-toolbar" }, this.search, el("label", { class: "field" }, archived, "archived"), this.picker, this.count, el("span", { class: "spring" }), this.compare),
      el("div", { class: "table-scroll" }, el("table", { class: "runs" }, this.head, this.body)),
      this.empty,
      this.more,
    );
  }

  async start() {
    await this.load();
    const soon = throttle(() => this.load(), 1500);
    // Metrics arrive all the time; the list's figures follow more slowly.
    const later = throttle(() => this.load(), 5000);
    subscribe(undefined, (kind) => (kind === "metrics" ? later() : soon()), soon);
  }

  async load() {
    this.abort?.abort();
    this.abort = new AbortController();
    try {
      const { runs, total } = await this.fetchRuns(this.abort.signal);
      Object.assign(this, { runs, total });
      this.search.removeAttribute("aria-invalid");
      this.render();
    } catch (error) {
      if (error.status === 400 || error.status === 422) {
        this.search.setAttribute("aria-invalid", "true");
        this.count.textContent = error.message;
      } else fail(error);
    }
  }

  async fetchRuns(signal) {
    const runs = [];
    let total = Infinity;
    while (runs.length < Math.min(total, this.limit)) {
      const asked = { q: this.q, archived: this.archived ? "true" : undefined, limit: PAGE, offset: runs.length };
      const answer = await request(`/runs${query(asked)}`, { signal });
      runs.push(...answer.runs);
      total = answer.total;
      if (!answer.runs.length) break;
    }
    return { runs, total };
  }

  setQuery(text) {
    this.q = text.trim();
    history.replaceState(null, "", `/${query({ q: this.q, archived: this.archived ? "true" : undefined })}`);
    this.load();
  }

  render() {
    // What somebody is typing into must not be replaced under their hands.
    if (this.body.querySelector(".editable-field")) return;
    const metrics = this.metrics || defaultMetrics(this.runs);
    const columns = columnsFor(metrics, this.runs);
    const column = columns.find(({ key }) => key === this.sort) || columns.find(({ key }) => key === "created");
    const places = assignColors(this.runs.map((run) => run.run));
    const shown = sortRuns(this.runs, column, this.descending);
    const focused = document.activeElement?.closest?.("tr[data-run] a") && document.activeElement.getAttribute("href");
    replaceContent(this.head, headerRow(columns, {
      sort: column.key,
      descending: this.descending,
      onsort: (chosen) => this.setSort(chosen),
      allSelected: shown.length > 0 && shown.every((run) => this.selected.has(run.run)),
      onselectall: (on) => this.select(shown.map((run) => run.run), on),
    }));
    const act = {
      patch: (run, changes) => this.patch(run, changes),
      archive: (run) => this.archive(run),
      remove: (run) => this.remove(run),
      pickTag: (tag) => this.pickTag(tag),
    };
    replaceContent(this.body, shown.map((run) => runRow(run, columns, {
      selected: this.selected.has(run.run),
      place: places.get(run.run),
      onselect: (id, on) => this.select([id], on),
      act,
    })));
    if (focused) this.body.querySelector(`a[href="${focused}"]`)?.focus();
    this.renderRest(metrics);
  }

  renderRest(metrics) {
    this.count.textContent = this.total === 1 ? "1 run" : `${this.total.toLocaleString("en")} runs`;
    this.more.hidden = this.runs.length >= this.total;
    this.empty.hidden = this.runs.length > 0;
    if (!this.runs.length) {
      replaceContent(this.empty, this.q
        ? el("p", {}, "No run matches. ", HELP, ".")
        : [el("h2", {}, "No runs yet"), el("pre", {}, 'import endlex\n\nrun = endlex.init("my-project", "first")\nrun.log({"train/loss": 3.2}, step=0)\nrun.finish()'), el("p", { class: "quiet" }, `Set ENDLEX_URL=${location.origin} where the trainer runs.`)]);
    }
    this.renderPicker(metrics);
    this.renderCompare();
  }

  renderPicker(metrics) {
    const names = metricNames(this.runs);
    this.picker.hidden = names.length === 0;
    const choose = (name, on) => {
      this.metrics = on ? [...metrics, name] : metrics.filter((other) => other !== name);
      remember("list.metrics", this.metrics);
      this.render();
    };
    const boxes = names.map((name) => {
      const box = el("input", { type: "checkbox", checked: metrics.includes(name), onchange: () => choose(name, box.checked) });
      return el("label", { class: "field" }, box, name);
    });
    replaceContent(this.picker, el("summary", { class: "button" }, "Columns"), el("div", { class: "picker-list" }, boxes));
  }

  renderCompare() {
    const count = this.selected.size;
    this.compare.hidden = count === 0;
    this.compare.textContent = count === 1 ? "Open 1 run" : `Compare ${count} runs`;
  }

  setSort(column) {
    this.descending = this.sort === column.key ? !this.descending : Boolean(column.down);
    this.sort = column.key;
    remember("list.sort", { sort: this.sort, descending: this.descending });
    this.render();
  }

  select(ids, on) {
    for (const id of ids) {
      if (on) this.selected.add(id);
      else this.selected.delete(id);
      this.body.querySelector(`tr[data-run="${CSS.escape(id)}"]`)?.classList.toggle("selected", on);
    }
    if (ids.length > 1) this.render();
    this.renderCompare();
  }

  openCompare() {
    const ids = [...this.selected];
    if (ids.length === 1) location.assign(`/runs/${encodeURIComponent(ids[0])}`);
    else location.assign(`/compare?runs=${ids.map(encodeURIComponent).join(",")}`);
  }

  async patch(run, changes) {
    await request(runPath(run.run), { method: "PATCH", body: changes });
    Object.assign(run, changes);
  }

  async archive(run) {
    const archived = !run.archived;
    try {
      await this.patch(run, { archived });
      await this.load();
      const undo = () => this.patch(run, { archived: !archived }).then(() => this.load(), fail);
      toast(`${run.name} ${archived ? "archived" : "is back in the list"}`, { action: "Undo", onaction: undo });
    } catch (error) {
      fail(error);
    }
  }

  async remove(run) {
    try {
      await this.patch(run, { deleted: true });
      this.selected.delete(run.run);
      await this.load();
      const undo = () => this.patch(run, { deleted: false }).then(() => this.load(), fail);
      toast(`${run.name} deleted; its data stays for 7 days`, { action: "Undo", onaction: undo, seconds: 15 });
    } catch (error) {
      fail(error);
    }
  }

  pickTag(tag) {
    this.search.value = `tag:${tag}`;
    this.setQuery(this.search.value);
  }
}

new RunsPage().start();
