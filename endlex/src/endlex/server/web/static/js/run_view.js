// One run: what it is, how it goes, and tabs for charts, samples, tables, configuration, system
// metrics and checkpoints. The same view serves the live page and the exported file.

import { listLink, tagQuery } from "./address.js";
import { AlertBanner } from "./alerts.js";
import { request, runPath } from "./api.js";
import { ChartBoard } from "./chart_board.js";
import { checkpointsView } from "./checkpoints.js";
import { hueOf } from "./colors.js";
import { configView } from "./config_view.js";
import { el, replaceContent, reporting, toast } from "./dom.js";
import { formatAgo, formatDate, formatDuration, formatNumber } from "./format.js";
import { editableTags, editableText } from "./inline_edit.js";
import { fillHeader } from "./page_header.js";
import { LogView, ownTexts } from "./log_view.js";
import { mediaView, samplesView, tablesView } from "./samples.js";
import { sessionsView } from "./sessions.js";
import { statusPill } from "./status.js";
import { tabList } from "./tabs.js";

const HEADLINES = ["val/bpb", "eval/core", "train/loss", "train/tokens_per_second", "train/mfu", "train/tokens"];
const MOST_HEADLINES = 6;

export class RunView {
  constructor(source, run, main) {
    Object.assign(this, { source, run, main });
    this.id = run.run;
    this.boards = [];
    this.viewers = {};
    this.build();
  }

  build() {
    const { run, source } = this;
    document.title = `${run.name} · Endlex`;
    fillHeader([["Runs", listLink()], [run.project, listLink({ project: run.project })], [run.name]], { offline: !source.live });
    this.alerts = new AlertBanner(source, this.id);
    this.facts = el("div", { class: "facts" });
    this.headlines = el("dl", { class: "headlines" });
    this.tabs = tabList(this.tabDefinitions(), "Parts of the run");
    replaceContent(this.main, this.title(), this.alerts.root, this.facts, this.headlines, this.tabs.bar, this.tabs.panel);
    this.renderFacts();
    this.alerts.refresh();
    this.tabs.open(location.hash.slice(1), false);
  }

  title() {
    const { run, source } = this;
    if (!source.live) return el("div", { class: "run-head" }, el("h1", {}, run.name));
    const save = (field) => (value) => this.patch({ [field]: value });
    const formats = ["csv", "json", "parquet", "html"].map((format) => el("a", { href: source.exportUrl(this.id, format), download: "" }, format === "html" ? "HTML (opens offline)" : format.toUpperCase()));
    return el(
      "div",
      { class: "run-head" },
      el("h1", {}, editableText(run.name, { label: "name", empty: run.run, onsave: save("name") })),
      editableTags(run.tags, { onsave: save("tags"), onpick: (tag) => location.assign(listLink({ q: tagQuery(tag) })) }),
      editableText(run.group, { label: "group", empty: "+ group", onsave: save("group") }),
      el("span", { class: "spring" }),
      el("details", { class: "picker" }, el("summary", { class: "button" }, "Export"), el("div", { class: "picker-list links" }, formats)),
      el("button", { type: "button", class: "button", onclick: (event) => this.archive(event.target) }, run.archived ? "Unarchive" : "Archive"),
      el("button", { type: "button", class: "button danger", onclick: () => this.remove() }, "Delete"),
      el("div", { class: "notes-line" }, editableText(run.notes, { label: "notes", empty: "Add notes", onsave: save("notes"), multiline: true, className: "notes" })),
    );
  }

  renderFacts() {
    const { run } = this;
    const { sessions = [] } = run;
    const fact = (label, content, title) => el("span", { class: "fact", title }, el("span", { class: "quiet" }, label), " ", content);
    replaceContent(this.facts, [
      statusPill(run.status),
      fact("started", formatDate(run.created)),
      fact("ran", formatDuration(run.updated - run.created)),
      fact("updated", this.source.live ? formatAgo(run.updated) : formatDate(run.updated), formatDate(run.updated)),
      run.host && fact("on", run.host),
      sessions.length > 1 && fact("sessions", String(sessions.length)),
      fact("id", el("code", {}, run.run)),
    ]);
    const last = new Map((run.metrics || []).map((metric) => [metric.name, metric]));
    const shown = HEADLINES.filter((name) => last.has(name));
    const more = [...last.keys()].filter((name) => !shown.includes(name) && !name.startsWith("system/"));
    replaceContent(this.headlines, [...shown, ...more].slice(0, MOST_HEADLINES).map((name) => headline(last.get(name))));
  }

  tabDefinitions() {
    const { run, source } = this;
    const viewer = (id, make) => () => (this.viewers[id] = make(source, this.id)).root;
    const tabs = [
      { id: "charts", label: "Charts", build: () => this.board("run", (name) => !isSystem(name)) },
      { id: "samples", label: "Samples", build: viewer("samples", samplesView) },
      { id: "tables", label: "Tables", build: viewer("tables", tablesView) },
      { id: "media", label: "Media", optional: true, build: viewer("media", mediaView) },
      { id: "config", label: "Config", build: () => configView(run.config) },
      { id: "system", label: "System", build: () => this.board("system", isSystem) },
      { id: "checkpoints", label: "Checkpoints", build: () => (this.checkpoints = el("div", {}, checkpointsView(source, this.id, run.checkpoints || []))) },
      { id: "log", label: "Log", optional: true, build: () => (this.viewers.log = new LogView(source, run)).root },
      { id: "sessions", label: "Sessions", build: () => sessionsView(run.sessions || []) },
    ];
    const counts = this.counts();
    return tabs.map((tab) => ({ ...tab, count: counts[tab.id] }));
  }

  // By tab, what there is of the run. An exported file has no media.
  counts() {
    const { metrics = [], texts = [], tables = [], media = [], checkpoints = [], sessions = [] } = this.run;
    const [system, log] = [metrics.filter(({ name }) => isSystem(name)).length, ownTexts(this.run).length];
    return { charts: metrics.length - system, system, samples: texts.length - log, log, tables: tables.length, media: this.source.live ? media.length : 0, checkpoints: checkpoints.length, sessions: sessions.length };
  }

  board(key, belongs) {
    const { run, source } = this;
    const metrics = run.metrics.map((metric) => metric.name).filter(belongs);
    const board = new ChartBoard(source, {
      key,
      project: run.project,
      runs: [{ ...run, label: run.name, hue: hueOf(run), metrics }],
      // A system session counts seconds from its own start, so only time joins several of them.
      xKinds: key === "system" ? ["elapsed", "time"] : undefined,
    });
    board.belongs = belongs;
    this.boards.push(board);
    return board.root;
  }

  // ---- what the server reports

  onEvent(kind, data) {
    if (kind === "metrics") {
      for (const board of this.boards) board.update(this.id, data.metrics.filter(board.belongs), data.last_step);
    }
    if (kind === "text") this.viewers[data.name.startsWith("run/") ? "log" : "samples"]?.refresh();
    if (kind === "media") this.viewers.media?.refresh();
    if (kind === "alert") this.alerts.refresh();
  }

  onReturn() {
    for (const board of this.boards) board.reload();
    for (const viewer of Object.values(this.viewers)) viewer.refresh();
    this.alerts.refresh();
    this.refresh();
  }

  refresh = reporting(async () => {
    Object.assign(this.run, await this.source.run(this.id));
    this.renderFacts();
    for (const [id, number] of Object.entries(this.counts())) this.tabs.setCount(id, number);
    this.viewers.tables?.refresh();
    this.viewers.log?.show();
    const open = this.checkpoints?.querySelector("details[open]");
    if (this.checkpoints && !open) replaceContent(this.checkpoints, checkpointsView(this.source, this.id, this.run.checkpoints));
  });

  // ---- what people change

  async patch(changes) {
    await request(runPath(this.id), { method: "PATCH", body: changes });
    Object.assign(this.run, changes);
    document.title = `${this.run.name} · Endlex`;
  }

  // Asks for all of the charts again, as after a press of Escape.
  showAll() {
    for (const board of this.boards) board.setView(null, null);
  }

  archive = reporting(async (button) => {
    await this.patch({ archived: !this.run.archived });
    button.textContent = this.run.archived ? "Unarchive" : "Archive";
    toast(this.run.archived ? "Archived" : "Back in the list");
  });

  remove = reporting(async () => {
    await this.patch({ deleted: true });
    const undo = reporting(() => this.patch({ deleted: false }));
    toast("Run deleted; its data stays for 7 days", { action: "Undo", onaction: undo, seconds: 30 });
  });
}

function headline(metric) {
  const { name, last, min, max } = metric;
  const title = `lowest ${formatNumber(min)}, highest ${formatNumber(max)}`;
  return el("div", { class: "headline", title }, el("dt", {}, name), el("dd", {}, formatNumber(last)));
}

function isSystem(name) {
  return name.startsWith("system/");
}
