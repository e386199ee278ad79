// The table of runs: which columns there are, how they sort, and a row for each run.

import { swatch } from "./chart_readout.js";
import { el } from "./dom.js";
import { compareText, formatAgo, formatDate, formatDuration, formatNumber } from "./format.js";
import { editableTags, editableText } from "./inline_edit.js";
import { statusPill } from "./status.js";

const PREFERRED = ["val/bpb", "eval/core", "core", "train/loss", "val/loss", "train/tokens_per_second", "train/mfu"];
const DEFAULT_METRICS = 4;

const BASE_COLUMNS = [
  { key: "name", label: "Name", sort: (run) => run.name },
  { key: "status", label: "Status", sort: (run) => run.status },
  { key: "project", label: "Project", sort: (run) => run.project },
  { key: "group", label: "Group", sort: (run) => run.group || "" },
  { key: "tags", label: "Tags", sort: (run) => (run.tags || []).join(",") },
  { key: "created", label: "Created", sort: (run) => run.created, down: true },
  { key: "duration", label: "Duration", sort: (run) => run.updated - run.created, down: true },
];
const LAST_COLUMNS = [
  { key: "host", label: "Host", sort: (run) => run.host || "" },
  { key: "notes", label: "Notes", sort: (run) => run.notes || "" },
];

export function metricNames(runs) {
  const counts = new Map();
  for (const run of runs) {
    for (const name of Object.keys(run.summary || {})) counts.set(name, (counts.get(name) || 0) + 1);
  }
  return [...counts.keys()].sort(compareText);
}

// What is shown until somebody chooses: the measures of quality first, then what most runs have.
export function defaultMetrics(runs) {
  const names = metricNames(runs);
  const preferred = PREFERRED.filter((name) => names.includes(name));
  const others = names.filter((name) => !preferred.includes(name) && !name.startsWith("system/"));
  return [...preferred, ...others].slice(0, DEFAULT_METRICS);
}

// `runs` decides which columns say something: one project or host for all is not worth a column.
export function columnsFor(metrics, runs) {
  const middle = metrics.map((name) => ({
    key: `metric:${name}`,
    label: name,
    metric: name,
    sort: (run) => numeric(run.summary?.[name]),
  }));
  return [...BASE_COLUMNS, ...middle, ...LAST_COLUMNS].filter(
    ({ key }) => !["project", "host"].includes(key) || new Set(runs.map((run) => run[key])).size > 1,
  );
}

function numeric(value) {
  if (typeof value === "number") return value;
  return { Infinity: Infinity, "-Infinity": -Infinity }[value] ?? NaN;
}

// Sorted copies; what has no value comes last in either direction.
export function sortRuns(runs, column, descending) {
  const missing = (value) => value === "" || value === undefined || value === null || Number.isNaN(value);
  const sign = descending ? -1 : 1;
  return [...runs].sort((left, right) => {
    const [a, b] = [column.sort(left), column.sort(right)];
    if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
    return sign * (typeof a === "number" ? a - b : compareText(String(a), String(b)));
  });
}

export function headerRow(columns, { sort, descending, onsort, allSelected, onselectall }) {
  const every = el("input", { type: "checkbox", checked: allSelected, "aria-label": "Select all runs", onchange: () => onselectall(every.checked) });
  return el(
    "tr",
    {},
    el("th", { scope: "col", class: "cell-select" }, every),
    columns.map((column) => {
      const on = column.key === sort;
      return el(
        "th",
        { scope: "col", class: `cell-${column.key.split(":")[0]}`, "aria-sort": on ? (descending ? "descending" : "ascending") : "none" },
        el("button", { type: "button", class: on ? "sort on" : "sort", title: `Sort by ${column.label}`, onclick: () => onsort(column) }, breakable(column.label), el("span", { class: "arrow", "aria-hidden": "true" }, on ? (descending ? "↓" : "↑") : "")),
      );
    }),
    el("th", { scope: "col", class: "cell-actions" }, el("span", { class: "offscreen" }, "Actions")),
  );
}

// Long metric names may break after a slash, and nowhere else.
function breakable(name) {
  return name.split(/(?<=\/)/).flatMap((part, index) => (index ? [el("wbr"), part] : [part]));
}

// `place` is the run's colour; `act` has patch(run, changes), archive, remove, pickTag.
export function runRow(run, columns, { selected, place, onselect, act }) {
  const box = el("input", { type: "checkbox", checked: selected, "aria-label": `Select ${run.name}`, onchange: () => onselect(run.run, box.checked) });
  return el(
    "tr",
    { data: { run: run.run }, class: selected ? "selected" : "" },
    el("td", { class: "cell-select" }, box),
    columns.map((column) => cell(run, column, place, act)),
    el(
      "td",
      { class: "cell-actions" },
      el("button", { type: "button", class: "link", onclick: () => act.archive(run) }, run.archived ? "Unarchive" : "Archive"),
      el("button", { type: "button", class: "link danger", onclick: () => act.remove(run) }, "Delete"),
    ),
  );
}

function cell(run, column, place, act) {
  const save = (field) => (value) => act.patch(run, { [field]: value });
  const contents = {
    name: () => [
      swatch(place),
      el("a", { href: `/runs/${encodeURIComponent(run.run)}`, class: "run-name" }, run.name || run.run),
      run.alerts > 0 && el("span", { class: "alert-count", title: `${run.alerts} open alerts` }, `⚠ ${run.alerts}`),
      run.archived && el("span", { class: "tag tag-quiet" }, "archived"),
    ],
    status: () => statusPill(run.status),
    project: () => run.project,
    group: () => editableText(run.group, { label: "group", empty: "+ group", onsave: save("group") }),
    tags: () => editableTags(run.tags, { onsave: save("tags"), onpick: act.pickTag }),
    created: () => el("time", { title: formatDate(run.created) }, formatAgo(run.created)),
    duration: () => formatDuration(run.updated - run.created),
    host: () => run.host || "–",
    notes: () => editableText(run.notes, { label: "notes", empty: "+ note", onsave: save("notes"), multiline: true }),
  };
  const content = column.metric ? formatNumber(run.summary?.[column.metric]) : contents[column.key]();
  const kind = column.metric ? "metric" : column.key;
  return el("td", { class: `cell-${kind}`, data: { label: column.label } }, content);
}
