// What a run printed, what it was (commit, changes, packages), and the exception that ended it.

import { debounce, download, el, replaceContent, reporting, throttle } from "./dom.js";
import { formatInteger } from "./format.js";

const PAGE = 1000; // chunks of a text, each a second of what was printed, or 8 KiB
const OPEN = ["run/exception", "run/console"];

// The names of the texts that Endlex records itself.
export function ownTexts({ texts = [] }) {
  return texts.filter((name) => name.startsWith("run/"));
}

export class LogView {
  constructor(source, run) {
    Object.assign(this, { source, run, parts: new Map() });
    this.root = el("section", { "aria-label": "Log", class: "records" });
    this.refresh = throttle(() => this.update(), 1000);
    this.show();
  }

  // Adds a part for every text that is new to the run.
  show() {
    const order = (name) => (OPEN.indexOf(name) + OPEN.length + 1) % (OPEN.length + 1);
    const names = ownTexts(this.run).sort((a, b) => order(a) - order(b));
    names.forEach((name, place) => {
      if (this.parts.has(name)) return;
      this.parts.set(name, new LogPart(this.source, this.run.run, name));
      this.root.insertBefore(this.parts.get(name).root, this.root.children[place] ?? null);
    });
  }

  update() {
    this.show();
    for (const part of this.parts.values()) part.refresh();
  }
}

class LogPart {
  constructor(source, run, name) {
    Object.assign(this, { source, run, name, title: name.replace("run/", ""), known: new Map(), floor: Infinity });
    this.lines = el("pre", { class: "sample" }, "Loading…");
    this.note = el("span", { class: "quiet", role: "status" });
    this.filter = el("input", { type: "search", placeholder: "Filter lines", "aria-label": `Filter lines of ${name}`, oninput: debounce(() => this.fill(), 100) });
    this.earlier = el("button", { type: "button", class: "button", hidden: true, onclick: reporting(() => this.loadEarlier()) }, "Earlier lines");
    const save = el("button", { type: "button", class: "button", onclick: reporting(() => this.save()) }, "Save");
    const toolbar = el("div", { class: "toolbar" }, this.filter, this.earlier, save, this.note);
    this.root = el("details", { class: "record", open: OPEN.includes(name) }, el("summary", {}, this.title), toolbar, this.lines);
    this.root.addEventListener("toggle", () => this.refresh());
  }

  // What was printed from the floor on, below which chunks may be missing that "Earlier lines" loads.
  get text() {
    const chunks = [...this.known.values()].filter(({ step }) => step >= this.floor);
    return chunks.sort((a, b) => a.step - b.step).map((chunk) => chunk.text).join("\n");
  }

  // A page of chunks, below a step or of those that arrived after another; highest step first.
  fetch(bounds) {
    return this.source.records("texts", this.run, { name: this.name, limit: PAGE, ...bounds });
  }

  // Loads the latest page, and from then on what arrived since, be it of an earlier session.
  refresh = reporting(async () => {
    if (!this.root.open) return;
    const after_id = this.newest;
    let page = after_id === undefined ? await this.loadEarlier() : await this.fetch({ after_id });
    // Only by the first page: what arrives while others are fetched may be in none of them.
    this.newest = page.reduce((newest, { id }) => Math.max(newest, id), after_id ?? 0);
    if (after_id === undefined) return;
    const fresh = [...page];
    while (page.length >= PAGE) fresh.push(...(page = await this.fetch({ after_id, before_step: page.at(-1).step })));
    if (fresh.length) this.merge(fresh);
  });

  async loadEarlier() {
    const page = await this.fetch({ before_step: this.floor < Infinity ? this.floor : undefined });
    this.floor = Math.min(this.floor, page.length < PAGE ? 0 : page.at(-1).step);
    this.earlier.hidden = this.floor === 0;
    this.merge(page);
    return page;
  }

  async save() {
    await this.refresh();
    while (!this.earlier.hidden) await this.loadEarlier();
    download(`${this.title}.txt`, this.text);
  }

  merge(fresh) {
    for (const chunk of fresh) this.known.set(chunk.step, chunk);
    this.fill();
  }

  // Shows the lines that match. Someone who reads at the end stays there.
  fill() {
    const { lines, text } = this;
    const wanted = this.filter.value.toLowerCase();
    const every = text.split("\n");
    const shown = wanted ? every.filter((line) => line.toLowerCase().includes(wanted)) : every;
    const { scrollTop, scrollHeight, clientHeight } = lines;
    replaceContent(lines, wanted ? shown.join("\n") : text);
    lines.scrollTop = scrollTop + clientHeight > scrollHeight - 5 ? lines.scrollHeight : scrollTop;
    this.note.textContent = `${wanted ? `${formatInteger(shown.length)} of ` : ""}${this.earlier.hidden ? "" : "the last "}${formatInteger(every.length)} lines`;
  }
}
