// How configurations relate to results: one key against another, and all of them side by side.

import { paint, hueOf } from "./colors.js";
import { runLink } from "./address.js";
import { el, recall, remember, replaceContent, reporting } from "./dom.js";
import { compareText, configKey, formatNumber, isMoreBetter, numeric } from "./format.js";
import { bestFirst, differingKeys } from "./run_table.js";
import { svg } from "./svg.js";

const WIDTH = 1000;
const HEIGHT = 460;
const EDGE = 70;
const TICKS = 5;

// A scale for values of one key: numbers are measured, anything else is put in order.
class Scale {
  constructor(values, log) {
    this.numbers = values.every((value) => Number.isFinite(numeric(value)));
    this.log = log && this.numbers && values.every((value) => numeric(value) > 0);
    this.words = this.numbers ? [] : [...new Set(values.map(String))].sort(compareText);
    const places = values.map((value) => this.raw(value));
    [this.low, this.high] = [Math.min(...places), Math.max(...places)];
    if (this.low === this.high) [this.low, this.high] = [this.low - 0.5, this.high + 0.5];
  }

  raw(value) {
    if (!this.numbers) return this.words.indexOf(String(value));
    return this.log ? Math.log10(numeric(value)) : numeric(value);
  }

  // From 0 to 1.
  share(value) {
    return (this.raw(value) - this.low) / (this.high - this.low);
  }

  ticks() {
    if (!this.numbers) return this.words.map((word) => [this.share(word), word]);
    return Array.from({ length: TICKS }, (_, i) => {
      const at = this.low + ((this.high - this.low) * i) / (TICKS - 1);
      return [i / (TICKS - 1), formatNumber(Number((this.log ? 10 ** at : at).toPrecision(3)))];
    });
  }
}

// What both views share: keys that somebody chooses, and the runs' values of them.
class KeysView {
  constructor(page, name) {
    Object.assign(this, { page, name });
    this.chosen = recall(`${name}.keys`, null);
    this.log = recall(`${name}.log`, false);
    this.picture = el("div", { class: "picture" });
    this.controls = el("div", { class: "toolbar" });
    this.root = el("section", { "aria-label": name }, this.controls, this.picture);
    this.refresh();
  }

  refresh = reporting(async () => {
    const { page } = this;
    if (!page.names) await page.fetch(page.ids, { names: "true", column: ["-"] });
    const [config, metrics] = [differingKeys(page.names), bestFirst(page.names)];
    this.all = [...config.map((key) => `config.${key}`), ...metrics.flatMap((name) => [name, (isMoreBetter(name) ? "max:" : "min:") + name])];
    this.keys = (this.chosen || this.first(config, metrics)).filter((key) => this.all.includes(key));
    const { keys } = this;
    const runs = await page.fetch(page.ids, { column: [...keys, "-"] });
    if (keys !== this.keys) return; // others were chosen meanwhile
    this.runs = runs;
    this.draw();
  });

  choose(keys) {
    this.chosen = this.keys = keys;
    remember(`${this.name}.keys`, keys);
    this.refresh();
  }

  select(label, chosen, onchange, empty) {
    const options = empty === undefined ? this.all : ["", ...this.all];
    const list = el("select", { "aria-label": label, onchange: () => onchange(list.value) }, options.map((key) => el("option", { value: key, selected: key === chosen }, configKey(key) || empty)));
    return el("label", { class: "field" }, label, list);
  }

  // Those that have a value of every key that is shown.
  usable() {
    return this.runs.filter((run) => this.keys.every((key) => run.values[key] !== undefined && run.values[key] !== null && run.values[key] !== "NaN"));
  }

  title(run) {
    return svg("title", {}, [run.name, ...this.keys.map((key) => `${configKey(key)}: ${run.values[key]}`)].join("\n"));
  }
}

export class ScatterView extends KeysView {
  constructor(page) {
    super(page, "scatter");
  }

  first(config, metrics) {
    return [config[0] ? `config.${config[0]}` : metrics[1] || metrics[0], metrics[0]];
  }

  draw() {
    const [x, y] = this.keys;
    const log = el("input", { type: "checkbox", checked: this.log, onchange: () => (remember("scatter.log", (this.log = log.checked)), this.draw()) });
    replaceContent(this.controls, this.select("x", x, (key) => this.choose([key, this.keys[1]])), this.select("y", y, (key) => this.choose([this.keys[0], key])), el("label", { class: "field" }, log, "log"));
    const runs = this.usable();
    if (!x || !y || !runs.length) return replaceContent(this.picture, el("p", { class: "quiet pad" }, "No run has both."));
    const [across, up] = this.keys.map((key) => new Scale(runs.map((run) => run.values[key]), this.log));
    const px = (share) => EDGE + share * (WIDTH - 2 * EDGE);
    const py = (share) => HEIGHT - EDGE / 2 - share * (HEIGHT - EDGE);
    const dots = runs.map((run) => svg("a", { href: runLink(run.run) }, svg("circle", { cx: px(across.share(run.values[x])), cy: py(up.share(run.values[y])), r: 6, fill: paint(hueOf(run)), class: "dot-mark" }, this.title(run))));
    const bottom = across.ticks().map(([share, text]) => svg("text", { x: px(share), y: HEIGHT - 2, "text-anchor": "middle" }, text));
    const left = up.ticks().map(([share, text]) => [svg("text", { x: EDGE - 12, y: py(share) + 4, "text-anchor": "end" }, text), svg("line", { x1: EDGE, x2: WIDTH - EDGE, y1: py(share), y2: py(share) })]);
    return replaceContent(this.picture, svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${y} against ${x} of ${runs.length} runs` }, left.flat(), bottom, dots));
  }
}

export class ParallelView extends KeysView {
  constructor(page) {
    super(page, "parallel");
  }

  first(config, metrics) {
    return [...config.slice(0, 5).map((key) => `config.${key}`), ...metrics.slice(0, 1)];
  }

  draw() {
    const { keys } = this;
    const chips = keys.map((key) => el("button", { type: "button", class: "tag", title: "Take away", onclick: () => this.choose(this.keys.filter((other) => other !== key)) }, `${configKey(key)} ✕`));
    replaceContent(this.controls, chips, this.select("add", "", (key) => key && this.choose([...this.keys.filter((other) => other !== key), key]), "axis…"));
    const runs = this.usable();
    if (keys.length < 2 || !runs.length) return replaceContent(this.picture, el("p", { class: "quiet pad" }, "Add axes that some runs have values of."));
    const scales = keys.map((key) => new Scale(runs.map((run) => run.values[key]), false));
    const px = (index) => EDGE + (index * (WIDTH - 2 * EDGE)) / (keys.length - 1);
    const py = (share) => HEIGHT - EDGE / 2 - share * (HEIGHT - 1.2 * EDGE);
    const lines = runs.map((run) => {
      const points = keys.map((key, index) => `${px(index)},${py(scales[index].share(run.values[key]))}`);
      return svg("a", { href: runLink(run.run) }, svg("polyline", { points: points.join(" "), stroke: paint(hueOf(run)), class: "run-line" }, this.title(run)));
    });
    const axes = keys.map((key, index) => [
      svg("line", { x1: px(index), x2: px(index), y1: py(0), y2: py(1), class: "axis" }),
      svg("text", { x: px(index), y: 16, "text-anchor": "middle", class: "axis-name" }, configKey(key)),
      scales[index].ticks().map(([share, text]) => svg("text", { x: px(index) - 5, y: py(share) + 4, "text-anchor": "end" }, text)),
    ]);
    return replaceContent(this.picture, svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${keys.join(", ")} of ${runs.length} runs` }, lines, axes.flat(2)));
  }
}
