// The table of runs: which columns there are, and a row for each run. A column is a field of runs, a
// metric's last, lowest or highest value (`val/bpb`, `min:val/bpb`), or a key of the configuration.

import { hueOf } from "./colors.js";
import { swatch } from "./chart_readout.js";
import { runLink } from "./address.js";
import { el, replaceContent } from "./dom.js";
import { configKey, formatAgo, formatCsv, formatDate, formatDuration, formatNumber, formatValue, isMoreBetter, numeric } from "./format.js";
import { editableTags, editableText } from "./inline_edit.js";
import { statusPill } from "./status.js";

const FIELDS = { name: "Name", status: "Status", project: "Project", group: "Group", tags: "Tags", created: "Created", duration: "Duration", host: "Host", notes: "Notes" };
const DOWN_FIRST = ["created", "duration"];
const PREFERRED = ["val/bpb", "eval/core", "core", "train/loss", "val/loss", "train/tokens_per_second", "train/mfu"];
const DEFAULT_METRICS = 4;
const DEFAULT_KEYS = 5;
const FIGURES = { "": "last", "min:": "lowest", "max:": "highest" };

const isField = (key) => key in FIELDS;
export const valueColumns = (columns) => columns.filter((key) => !isField(key));

// A column's metric or configuration key, and which figure: ["min:", "val/bpb"].
function parts(key) {
  const [, figure, name] = /^((?:min|max|last):)?(.*)$/s.exec(key);
  return [figure || "", name];
}

// `names` is what the server answers: metrics [[name, runs]], config [[key, runs, different values]].
function isMetric(key, names) {
  return names.metrics.some(([name]) => name === parts(key)[1]);
}

// A configuration key as a column, which must not be taken for a metric of the same name.
function configColumn(key, names) {
  return isField(key) || parts(key)[0] || isMetric(key, names) ? `config.${key}` : key;
}

// The metrics that say how good a run is come first; what is measured of the machine is left out.
export function bestFirst({ metrics }) {
  const names = metrics.map(([name]) => name).filter((name) => !name.startsWith("system/"));
  return [...new Set([...PREFERRED.filter((name) => names.includes(name)), ...names])];
}

export function differingKeys({ config }) {
  return config.filter(([, , different]) => different > 1).map(([key]) => key);
}

// What is shown until somebody chooses: what differs, then measures of quality, then what most have.
export function defaultColumns(names, runs) {
  const says = (key) => !["project", "host"].includes(key) || new Set(runs.map((run) => run[key])).size > 1;
  const keys = differingKeys(names).slice(0, DEFAULT_KEYS).map((key) => configColumn(key, names));
  const first = ["name", "status", "project", "created"].filter(says);
  return [...first, ...keys, ...bestFirst(names).slice(0, DEFAULT_METRICS), "group", "tags", "duration", "notes"];
}

// A menu of all columns, filled when it is opened: there may be hundreds of metrics.
export function columnPicker(state, onchange) {
  const list = el("div", { class: "picker-rows" });
  const filter = el("input", { type: "search", placeholder: "Find a column", "aria-label": "Find a column", oninput: () => fill() });
  const reset = el("button", { type: "button", class: "link", onclick: () => (onchange(null), fill()) }, "as at first");
  const set = (key, on) => {
    const { columns } = state();
    onchange(on ? [...columns, key] : columns.filter((other) => other !== key));
  };
  const box = (key, text, more) => {
    const check = el("input", { type: "checkbox", checked: state().columns.includes(key), onchange: () => set(key, check.checked) });
    return el("div", { class: "field" }, el("label", { class: "field" }, check, text), more);
  };
  const metricRow = (name) => {
    const shown = state().columns.find((key) => parts(key)[1] === name && isMetric(key, state().names));
    const figure = el(
      "select",
      { "aria-label": `Figure of ${name}`, onchange: () => onchange([...state().columns.filter((key) => parts(key)[1] !== name), figure.value + name]) },
      Object.entries(FIGURES).map(([value, text]) => el("option", { value, selected: shown ? parts(shown)[0] === value : value === "" }, text)),
    );
    return box(shown || name, name, figure);
  };
  const fill = () => {
    const { names } = state();
    const wanted = (name) => name.toLowerCase().includes(filter.value.toLowerCase());
    const section = (title, rows) => rows.length > 0 && [el("strong", {}, title), rows];
    const differing = names.config.filter(([key, , different]) => different > 1 && wanted(key));
    const equal = names.config.filter(([key, , different]) => different <= 1 && wanted(key));
    const keyRow = ([key]) => box(configColumn(key, names), key);
    replaceContent(
      list,
      section("Configuration that differs", differing.map(keyRow)),
      section("Metrics", [...new Set([...bestFirst(names), ...names.metrics.map(([name]) => name)])].filter(wanted).map(metricRow)),
      section("Of the run", Object.keys(FIELDS).filter(wanted).map((key) => box(key, FIELDS[key]))),
      section("Configuration that is the same", equal.map(keyRow)),
    );
  };
  const root = el("details", { class: "picker" }, el("summary", { class: "button" }, "Columns"), el("div", { class: "picker-list" }, el("div", { class: "field" }, filter, reset), list));
  root.addEventListener("toggle", () => root.open && fill());
  return root;
}

export function headerRow({ columns, names }, { sort, onsort, select, actions = true }) {
  const [descending, sorted] = [sort.startsWith("-"), sort.replace(/^-/, "")];
  const again = (key) => {
    const down = key === sorted ? !descending : DOWN_FIRST.includes(key) || (isMetric(key, names) && isMoreBetter(key));
    onsort((down ? "-" : "") + key);
  };
  return el(
    "tr",
    {},
    select && el("th", { scope: "col", class: "cell-select" }, select),
    columns.map((key) => {
      const on = key === sorted;
      const [figure, name] = parts(key);
      const label = FIELDS[key] || configKey(name);
      return el(
        "th",
        { scope: "col", class: cellClass(key, names), "aria-sort": on ? (descending ? "descending" : "ascending") : "none" },
        el("button", { type: "button", class: on ? "sort on" : "sort", title: `Sort by ${key}`, onclick: () => again(key) }, breakable(label), figure && el("small", {}, ` ${FIGURES[figure]}`), el("span", { class: "arrow", "aria-hidden": "true" }, on ? (descending ? "↓" : "↑") : "")),
      );
    }),
    actions && el("th", { scope: "col", class: "cell-actions" }, el("span", { class: "offscreen" }, "Actions")),
  );
}

function cellClass(key, names) {
  return `cell-${isField(key) ? key : isMetric(key, names) ? "metric" : "config"}`;
}

// Long metric names may break after a slash, and nowhere else.
function breakable(name) {
  return name.split(/(?<=\/)/).flatMap((part, index) => (index ? [el("wbr"), part] : [part]));
}

// By metric column the best of the runs' values.
export function bestValues(runs, columns, names) {
  const best = new Map();
  for (const key of valueColumns(columns).filter((column) => isMetric(column, names))) {
    const values = runs.map((run) => numeric(run.values[key])).filter(Number.isFinite);
    if (new Set(values).size > 1) best.set(key, isMoreBetter(key) ? Math.max(...values) : Math.min(...values));
  }
  return best;
}

// `act` has patch(run, changes) and pickTag; `actions` stand at the row's end. With `best` the best value of each
// column is marked, and with a `baseline` run the others' differences to it.
export function runRow(run, { columns, names }, { select, act, actions, best, baseline, selected }) {
  return el(
    "tr",
    { data: { run: run.run }, class: `${selected ? "selected" : ""}${baseline === run ? " baseline" : ""}` },
    select && el("td", { class: "cell-select" }, select),
    columns.map((key) => {
      const content = isField(key) ? fieldContent(run, key, act) : valueContent(run, key, isMetric(key, names), baseline);
      const marked = best?.has(key) && best.get(key) === numeric(run.values[key]);
      return el("td", { class: `${cellClass(key, names)}${marked ? " best" : ""}`, title: marked ? "the best of these runs" : undefined, data: { label: FIELDS[key] || key } }, content);
    }),
    actions && el("td", { class: "cell-actions" }, actions),
  );
}

function valueContent(run, key, metric, baseline) {
  const value = run.values[key];
  if (value === undefined || value === null) return el("span", { class: "quiet" }, "–");
  const shown = typeof value === "number" ? formatNumber(value) : formatValue(value);
  if (!baseline || baseline === run) return shown;
  const base = baseline.values[key];
  if (!metric) return base === value ? shown : el("strong", {}, shown);
  const difference = numeric(value) - numeric(base);
  if (!Number.isFinite(difference) || difference === 0) return shown;
  const good = isMoreBetter(key) ? difference > 0 : difference < 0;
  return [shown, el("small", { class: good ? "delta good" : "delta bad" }, `${difference > 0 ? "+" : "−"}${formatNumber(Math.abs(difference))}`)];
}

function fieldContent(run, key, act) {
  const save = (field) => (value) => act.patch(run, { [field]: value });
  const contents = {
    name: () => [
      swatch(hueOf(run)),
      el("a", { href: runLink(run.run), class: "run-name" }, run.name || run.run),
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
  return contents[key]();
}

// The table as it is shown, for other programs.
export function tableCsv(runs, columns) {
  const cell = (run, key) => (key === "duration" ? run.updated - run.created : isField(key) ? run[key] : run.values[key]);
  const rows = runs.map((run) => [run.run, ...columns.map((key) => cell(run, key))]);
  return formatCsv([["run", ...columns], ...rows]);
}
