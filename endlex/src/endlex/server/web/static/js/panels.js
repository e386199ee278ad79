// Charts that somebody put together, saved for everybody under the project: any metrics, any x, in the
// order in which they are wanted. A pinned chart is one with a single metric.

import { ask } from "./ask.js";
import { el, fail } from "./dom.js";

const NAME = "charts";
const NUMBERS = ["smoothing", "xMin", "xMax", "yMin", "yMax"];

export class Panels {
  // `onchange` is called when the list has changed.
  constructor(source, project, onchange) {
    Object.assign(this, { source, project, onchange, list: [], stored: [], saved: Promise.resolve() });
    addEventListener("pagehide", () => this.save());
  }

  async load() {
    try {
      const { panels } = await this.source.settings(this.project);
      this.list = this.stored = panels[NAME]?.list || [];
    } catch (error) {
      fail(error);
    }
    if (this.list.length) this.onchange();
  }

  async set(list) {
    this.list = list;
    this.onchange();
    this.unsent = true;
    this.saved = this.saved.catch(() => {}).then(() => this.save()); // in turn: the last change wins
    try {
      await this.saved;
    } catch (error) {
      if (this.list === list) this.list = this.stored;
      else this.unsent = true; // with the later change that waits
      this.onchange();
      fail(error);
    }
  }

  // Sends the latest list unless it is on its way already.
  async save() {
    if (!this.unsent) return;
    this.unsent = false;
    const { list } = this;
    await this.source.save(this.project, "panels", NAME, { list });
    this.stored = list; // what the server has, for when a later change cannot be saved
  }

  pin(metric, own) {
    return this.set([...this.list, { metrics: [metric], ...own }]);
  }

  remove(panel) {
    return this.set(this.list.filter((other) => other !== panel));
  }

  // Moves a panel by places, or to that of another.
  move(panel, by) {
    const to = typeof by === "number" ? this.list.indexOf(panel) + by : this.list.indexOf(by);
    if (to < 0 || to >= this.list.length) return;
    const rest = this.list.filter((other) => other !== panel);
    this.set([...rest.slice(0, to), panel, ...rest.slice(to)]);
  }

  // Asks for a panel's content, of a new one without `panel`.
  async edit(metrics, xKinds, panel) {
    const given = panel || { metrics: [] };
    const number = (name, label) => ({ name, label, type: "number", value: given[name] });
    const values = await ask(panel ? "Edit panel" : "New panel", [
      { name: "metrics", label: "Metrics", value: given.metrics.join(", "), required: true, list: metrics, hint: "Names with commas between them; * stands for any text: train/*" },
      { name: "title", label: "Title", value: given.title, placeholder: "the metrics' names" },
      { name: "x", label: "Horizontal axis", value: given.x, list: [...xKinds, ...metrics], placeholder: "as chosen above the charts" },
      number("yMin", "y from"), number("yMax", "y to"), number("xMin", "x from"), number("xMax", "x to"),
      { name: "logY", label: "Logarithmic y", type: "checkbox", value: given.logY },
      { name: "logX", label: "Logarithmic x", type: "checkbox", value: given.logX },
      { ...number("smoothing", "Smoothing"), placeholder: "as chosen above the charts" },
      { name: "size", label: "Size", type: "select", value: given.size, options: [["", "one column"], ["wide", "whole width"]] },
    ]);
    const next = values && parse(values);
    if (!next?.metrics.length) return;
    this.set(panel ? this.list.map((other) => (other === panel ? next : other)) : [...this.list, next]);
  }

  // What stands in the head of a panel's chart; `edit` opens the form.
  buttons(panel, edit) {
    return [
      ["◀", "Move to the left", () => this.move(panel, -1)],
      ["▶", "Move to the right", () => this.move(panel, 1)],
      ["✎", "Edit panel", edit],
      ["✕", "Remove panel", () => this.remove(panel)],
    ];
  }

  // Lets a panel be dragged by its title to the place of another.
  makeDraggable(root, panel) {
    const title = root.querySelector(".chart-title");
    title.draggable = true;
    title.addEventListener("dragstart", () => (this.dragged = panel));
    root.addEventListener("dragover", (event) => this.dragged && event.preventDefault());
    root.addEventListener("drop", (event) => {
      event.preventDefault();
      const { dragged } = this;
      this.dragged = null;
      if (dragged && dragged !== panel) this.move(dragged, panel);
    });
  }
}

// The form's texts as a panel: what is left empty follows the board.
function parse(values) {
  const panel = { metrics: values.metrics.split(",").map((name) => name.trim()).filter(Boolean) };
  for (const [name, value] of Object.entries(values)) {
    if (name === "metrics" || value === "" || value === false) continue;
    panel[name] = NUMBERS.includes(name) ? Number(value) : value;
  }
  return panel;
}

// The metrics that a panel's names and patterns mean, each once.
export function metricsOf(panel, known) {
  const found = panel.metrics.flatMap((name) => {
    if (!name.includes("*")) return known.filter((metric) => metric === name);
    const parts = name.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&"));
    const pattern = new RegExp(`^${parts.join(".*")}$`);
    return known.filter((metric) => pattern.test(metric));
  });
  return [...new Set(found)];
}

export function panelsSection(charts) {
  return el(
    "section",
    { class: "chart-group panels", "aria-label": "Panels" },
    el("div", { class: "chart-grid" }, charts.map((chart) => chart.root)),
  );
}
