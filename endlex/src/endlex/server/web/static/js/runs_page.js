// The list of runs: search, sort, columns and saved views; edit in place; choose many, then compare,
// tag, group, archive, delete or export them.

import { compareLink, listLink, readAddress, runLink, tagQuery, writeAddress } from "./address.js";
import { ApiSource, subscribe } from "./api.js";
import { ask } from "./ask.js";
import { debounce, download, el, fail, recall, remember, replaceContent, reporting, throttle, toast } from "./dom.js";
import { bindKeys, moveFocus } from "./keys.js";
import { fillHeader } from "./page_header.js";
import { columnPicker, defaultColumns, headerRow, runRow, tableCsv, valueColumns } from "./run_table.js";

const PAGE = 500;
const SORT = "-created";
// What a view is, and what of the page stands in the address.
const VIEW_KEYS = ["q", "sort", "columns", "archived"];

class RunsPage {
  constructor() {
    const { project = "", q = "", sort, columns, archived } = readAddress();
    Object.assign(this, { project, q, archived: archived === "true", limit: PAGE });
    this.source = new ApiSource();
    this.sort = sort || recall("list.sort", SORT);
    this.chosen = columns ? columns.split("~") : recall(`list.columns.${project}`, null);
    this.selected = new Set();
    this.names = { metrics: [], config: [], projects: [] };
    this.runs = [];
    this.views = {};
    this.build();
  }

  build() {
    fillHeader(this.project ? [["Runs", listLink()], [this.project]] : [["Runs"]]);
    const help = document.getElementById("search-help");
    this.search = el("input", {
      type: "search", class: "search", value: this.q, placeholder: "Search: d12 tag:good val/bpb<0.9 lr=0.02", "aria-label": "Search runs",
      oninput: debounce(() => this.setQuery(this.search.value), 200),
    });
    this.error = el("p", { class: "bad", role: "alert", hidden: true });
    this.help = el("details", { class: "picker" }, el("summary", { class: "button", title: "What can be searched for" }, "?"), el("div", { class: "picker-list" }, el("pre", {}, help?.content.textContent.trim())));
    const archived = el("input", { type: "checkbox", checked: this.archived, onchange: () => this.show({ archived: archived.checked }) });
    this.projects = el("select", { hidden: true, "aria-label": "Project", onchange: () => location.assign(listLink({ project: this.projects.value })) });
    this.saved = el("details", { class: "picker" });
    this.picker = columnPicker(() => this, (columns) => this.show({ columns }));
    this.count = el("span", { class: "quiet", role: "status" });
    this.bulk = el("div", { class: "toolbar bulk", hidden: true, "aria-label": "What to do with the selected runs" });
    this.head = el("thead");
    this.body = el("tbody");
    this.more = el("button", { type: "button", class: "button", hidden: true, onclick: () => ((this.limit += PAGE), this.load()) }, "Show more");
    this.empty = el("div", { class: "empty", hidden: true });
    replaceContent(
      document.getElementById("main"),
      el("h1", { class: "offscreen" }, "Runs"),
      el("div", { class: "toolbar list-toolbar" }, this.projects, this.search, this.help, el("label", { class: "field" }, archived, "archived"), this.picker, this.saved, this.count),
      this.error,
      this.bulk,
      el("div", { class: "table-scroll" }, el("table", { class: "runs" }, this.head, this.body)),
      this.empty,
      this.more,
    );
    bindKeys({
      "/": ["search", () => this.search.focus()],
      j: ["next run", () => moveFocus("tbody .run-name", 1)],
      k: ["run before", () => moveFocus("tbody .run-name", -1)],
      x: ["select the run", () => document.activeElement.closest("tr")?.querySelector("input").click()],
      c: ["compare the selected runs", () => this.selected.size && this.openCompare()],
      Escape: ["select nothing", () => this.select([...this.selected], false)],
    });
  }

  async start() {
    this.loadViews();
    await this.load();
    const soon = throttle(() => this.load(), 1500);
    // Metrics arrive all the time; the list's figures follow more slowly.
    const later = throttle(() => this.load(), 5000);
    subscribe(undefined, (kind) => (kind === "metrics" ? later() : soon()), soon);
  }

  // ---- what is shown

  get columns() {
    return this.chosen || defaultColumns(this.names, this.runs);
  }

  async load() {
    this.abort?.abort();
    this.abort = new AbortController();
    const { signal } = this.abort;
    try {
      const asked = { q: this.q, project: this.project, archived: this.archived ? "true" : undefined };
      // What there is comes first where nobody has chosen: it decides what to ask for.
      if (!this.names.known) {
        const { runs, ...names } = await this.source.runs({ ...asked, column: ["-"], names: "true", limit: PAGE }, signal);
        Object.assign(this, { runs, names: { ...names, known: true } });
      }
      const columns = valueColumns(this.columns);
      let total = Infinity;
      const runs = [];
      while (runs.length < Math.min(total, this.limit)) {
        const answer = await this.source.runs({ ...asked, sort: this.sort, column: columns.length ? columns : ["-"], names: runs.length ? undefined : "true", limit: PAGE, offset: runs.length }, signal);
        runs.push(...answer.runs);
        total = answer.total;
        if (answer.metrics) this.names = { ...answer, known: true };
        if (!answer.runs.length) break;
      }
      Object.assign(this, { runs, total });
      this.error.hidden = true;
      this.search.removeAttribute("aria-invalid");
      this.render();
    } catch (error) {
      if (error.status === 400 || error.status === 422) this.refuse(error);
      else fail(error);
    }
  }

  refuse(error) {
    this.search.setAttribute("aria-invalid", "true");
    this.error.textContent = error.message;
    this.error.hidden = false;
    // A metric that is gone, or was never there, must not keep the list from being shown.
    if (error.message.includes(this.sort.replace(/^-/, "")) && this.sort !== SORT) this.show({ sort: SORT });
  }

  // Changes what is shown: q, sort, columns or archived.
  show({ columns, ...changes }) {
    Object.assign(this, changes);
    if (columns !== undefined) this.chosen = columns;
    remember("list.sort", this.sort);
    remember(`list.columns.${this.project}`, this.chosen);
    writeAddress(this.view());
    this.load();
  }

  view() {
    return { q: this.q, sort: this.sort === SORT ? "" : this.sort, columns: this.chosen ? this.chosen.join("~") : "", archived: this.archived ? "true" : "" };
  }

  setQuery(text) {
    this.search.value = text;
    this.show({ q: text.trim() });
  }

  render() {
    // What somebody is typing into must not be replaced under their hands.
    if (this.body.querySelector(".editable-field")) return;
    const focused = document.activeElement?.closest?.("tr[data-run] a") && document.activeElement.getAttribute("href");
    const every = el("input", { type: "checkbox", checked: this.runs.length > 0 && this.runs.every((run) => this.selected.has(run.run)), "aria-label": "Select all runs", onchange: () => this.select(this.runs.map((run) => run.run), every.checked) });
    const table = { columns: this.columns, names: this.names };
    replaceContent(this.head, headerRow(table, { sort: this.sort, onsort: (sort) => this.show({ sort }), select: every }));
    const act = { patch: (run, changes) => this.patch(run, changes), pickTag: (tag) => this.setQuery(tagQuery(tag)) };
    replaceContent(this.body, this.runs.map((run) => {
      const box = el("input", { type: "checkbox", checked: this.selected.has(run.run), "aria-label": `Select ${run.name}`, onchange: () => this.select([run.run], box.checked) });
      const actions = [
        el("button", { type: "button", class: "link", onclick: () => this.archive([run.run], !run.archived) }, run.archived ? "Unarchive" : "Archive"),
        el("button", { type: "button", class: "link danger", onclick: () => this.remove([run.run]) }, "Delete"),
      ];
      return runRow(run, table, { select: box, selected: this.selected.has(run.run), act, actions });
    }));
    if (focused) this.body.querySelector(`a[href="${focused}"]`)?.focus();
    this.renderRest();
  }

  renderRest() {
    this.count.textContent = this.total === 1 ? "1 run" : `${this.total.toLocaleString("en")} runs`;
    this.more.hidden = this.runs.length >= this.total;
    this.empty.hidden = this.runs.length > 0;
    if (!this.runs.length) {
      replaceContent(this.empty, this.q || this.project || this.archived
        ? el("p", {}, "No run matches.")
        : [el("h2", {}, "No runs yet"), el("pre", {}, 'import endlex\n\nrun = endlex.init("my-project", "first")\nrun.log({"train/loss": 3.2}, step=0)\nrun.finish()'), el("p", { class: "quiet" }, `Set ENDLEX_URL=${location.origin}${listLink().slice(0, -1)} where the trainer runs.`)]);
    }
    const { projects } = this.names;
    this.projects.hidden = projects.length < 2 && !this.project;
    replaceContent(this.projects, el("option", { value: "" }, "all projects"), projects.map(([name, count]) => el("option", { value: name, selected: name === this.project }, `${name} (${count})`)));
    this.renderBulk();
  }

  // ---- saved views

  async loadViews() {
    try {
      this.views = (await this.source.settings(this.project)).view;
    } catch (error) {
      fail(error);
    }
    const remove = (name) => this.saveView(name, null);
    const rows = Object.entries(this.views).map(([name, view]) =>
      el("div", { class: "field" }, el("a", { href: listLink({ project: this.project, ...view }) }, name), el("button", { type: "button", class: "icon-button", "aria-label": `Delete the view ${name}`, onclick: () => remove(name) }, "✕")),
    );
    const save = el("button", { type: "button", class: "button", onclick: () => this.nameView() }, "Save this view");
    replaceContent(this.saved, el("summary", { class: "button" }, `Views${rows.length ? ` (${rows.length})` : ""}`), el("div", { class: "picker-list" }, rows, save));
  }

  async nameView() {
    const given = await ask("Save this view", [{ name: "name", label: "Name", required: true, list: Object.keys(this.views) }], { note: "Search, sort and columns, for everybody who sees the project" });
    if (given) this.saveView(given.name, Object.fromEntries(VIEW_KEYS.map((key) => [key, this.view()[key]]).filter(([, value]) => value)));
  }

  saveView = reporting(async (name, content) => {
    await this.source.save(this.project, "view", name, content);
    await this.loadViews();
  });

  // ---- the selected runs

  select(ids, on) {
    for (const id of ids) {
      if (on) this.selected.add(id);
      else this.selected.delete(id);
      const row = this.body.querySelector(`tr[data-run="${CSS.escape(id)}"]`);
      row?.classList.toggle("selected", on);
      if (row) row.querySelector("input").checked = on;
    }
    this.renderBulk();
  }

  renderBulk() {
    const ids = [...this.selected];
    this.bulk.hidden = ids.length === 0;
    const button = (text, onclick, kind = "button") => el("button", { type: "button", class: kind, onclick }, text);
    replaceContent(
      this.bulk,
      button(ids.length === 1 ? "Open 1 run" : `Compare ${ids.length} runs`, () => this.openCompare(), "button primary"),
      button("Tag", () => this.tag(ids)),
      button("Group", () => this.group(ids)),
      button(this.archived ? "Unarchive" : "Archive", () => this.archive(ids, !this.archived)),
      button("Export table", () => download("runs.csv", tableCsv(this.runs.filter((run) => this.selected.has(run.run)), this.columns), "text/csv")),
      button("Delete", () => this.remove(ids), "button danger"),
      button("Select nothing", () => this.select(ids, false), "link"),
    );
  }

  openCompare() {
    const ids = [...this.selected];
    location.assign(ids.length === 1 ? runLink(ids[0]) : compareLink(ids));
  }

  async tag(ids) {
    const known = [...new Set(this.runs.flatMap((run) => run.tags))];
    const given = await ask(`Tag ${ids.length} runs`, [{ name: "add", label: "Add", list: known }, { name: "remove", label: "Remove", list: known }], { note: "Several with commas between them" });
    const list = (text) => text.split(",").map((tag) => tag.trim()).filter(Boolean);
    if (given) this.change(ids, { add_tags: list(given.add), remove_tags: list(given.remove) });
  }

  async group(ids) {
    const known = [...new Set(this.runs.map((run) => run.group).filter(Boolean))];
    const given = await ask(`Group of ${ids.length} runs`, [{ name: "group", label: "Group", list: known, placeholder: "none" }]);
    if (given) this.change(ids, { group: given.group || null });
  }

  async change(ids, changes) {
    try {
      await this.source.change(ids, changes);
      await this.load();
      return true;
    } catch (error) {
      fail(error);
      return false;
    }
  }

  async patch(run, changes) {
    await this.source.change([run.run], changes);
    Object.assign(run, changes);
  }

  async archive(ids, archived) {
    if (!(await this.change(ids, { archived }))) return;
    this.select(ids, false);
    toast(`${told(ids)} ${archived ? "archived" : "back in the list"}`, { action: "Undo", onaction: () => this.change(ids, { archived: !archived }) });
  }

  async remove(ids) {
    if (!(await this.change(ids, { deleted: true }))) return;
    this.select(ids, false);
    toast(`${told(ids)} deleted; the data stays for 7 days`, { action: "Undo", onaction: () => this.change(ids, { deleted: false }), seconds: 15 });
  }
}

function told(ids) {
  return ids.length === 1 ? "Run" : `${ids.length} runs`;
}

new RunsPage().start();
