// Tables of several runs: where their configurations differ, and what their metrics came to.

import { swatch } from "./chart_readout.js";
import { el, replaceContent } from "./dom.js";
import { compareText, flatten, formatNumber, formatValue } from "./format.js";

function runHeads(runs, places) {
  return runs.map((run) => el("th", { scope: "col" }, swatch(places.get(run.run)), el("a", { href: `/runs/${encodeURIComponent(run.run)}` }, run.name)));
}

// [[key, [value of each run]]] of the keys whose values are not all equal.
function differingKeys(configs) {
  const flat = configs.map((config) => new Map(flatten(config || {})));
  const keys = [...new Set(flat.flatMap((entries) => [...entries.keys()]))].sort(compareText);
  const rows = keys.map((key) => [key, flat.map((entries) => entries.get(key))]);
  return rows.map(([key, values]) => {
    const texts = new Set(values.map((value) => JSON.stringify(value)));
    return { key, values, differs: texts.size > 1 };
  });
}

export function configDiff(runs, places) {
  const rows = differingKeys(runs.map((run) => run.config));
  const body = el("tbody");
  const every = el("input", { type: "checkbox", onchange: () => fill() });
  const fill = () => {
    const shown = rows.filter((row) => row.differs || every.checked);
    replaceContent(
      body,
      shown.length
        ? shown.map(({ key, values, differs }) =>
            el("tr", { class: differs ? "differs" : "", data: { key } }, el("th", { scope: "row" }, key), values.map((value) => el("td", { class: value === undefined ? "quiet" : "" }, value === undefined ? "–" : formatValue(value)))),
          )
        : el("tr", {}, el("td", { colSpan: runs.length + 1, class: "quiet" }, "The configurations are equal.")),
    );
  };
  fill();
  return el(
    "section",
    { "aria-label": "Differences in configuration" },
    el("div", { class: "toolbar" }, el("label", { class: "field" }, every, "show equal keys too")),
    el("div", { class: "table-scroll" }, el("table", { class: "plain sticky-first" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Key"), runHeads(runs, places))), body)),
  );
}

const FIGURES = { last: "last value", min: "lowest", max: "highest" };

export function summaryTable(runs, places) {
  const metrics = runs.map((run) => new Map((run.metrics || []).map((metric) => [metric.name, metric])));
  const names = [...new Set(metrics.flatMap((known) => [...known.keys()]))].filter((name) => !name.startsWith("system/")).sort(compareText);
  const body = el("tbody");
  const figure = el("select", { "aria-label": "Which figure", onchange: () => fill() }, Object.entries(FIGURES).map(([value, label]) => el("option", { value }, label)));
  const fill = () =>
    replaceContent(
      body,
      names.map((name) => {
        const values = metrics.map((known) => known.get(name)?.[figure.value]);
        return el("tr", { data: { metric: name } }, el("th", { scope: "row" }, name), values.map((value) => el("td", { class: "number" }, formatNumber(value))));
      }),
    );
  fill();
  return el(
    "section",
    { "aria-label": "Summary" },
    el("div", { class: "toolbar" }, el("label", { class: "field" }, "show", figure)),
    el("div", { class: "table-scroll" }, el("table", { class: "plain sticky-first" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Metric"), runHeads(runs, places))), body)),
  );
}
