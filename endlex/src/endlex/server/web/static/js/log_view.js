// What a run printed, what it was (commit, changes, packages), and the exception that ended it.

import { debounce, download, el, replaceContent, reporting, throttle } from "./dom.js";
import { formatInteger } from "./format.js";

const PAGE = 1000; // chunks of a text, each a second of what was printed, or 8 KiB
const FEW = 20; // chunks to look for what is new in
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
    Object.assign(this, { source, run, name, title: name.replace("run/", ""), chunks: [] });
    this.lines = el("pre", { class: "sample" }, "Loading…");
    this.note = el("span", { class: "quiet", role: "status" });
    this.filter = el("input", { type: "search", placeholder: "Filter lines", "aria-label": `Filter lines of ${name}`, oninput: debounce(() => this.fill(), 100) });
    this.earlier = el("button", { type: "button", class: "button", hidden: true, onclick: reporting(() => this.loadEarlier()) }, "Earlier lines");
    const save = el("button", { type: "button", class: "button", onclick: reporting(() => this.save()) }, "Save");
    const toolbar = el("div", { class: "toolbar" }, this.filter, this.earlier, save, this.note);
    this.root = el("details", { class: "record", open: OPEN.includes(name) }, el("summary", {}, this.title), toolbar, this.lines);
    this.root.addEventListener("toggle", () => this.refresh());
  }

  get text() {
    return this.chunks.map((chunk) => chunk.text).join("\n");
  }

  // The latest chunks, or those before a step; newest first.
  fetch(limit, before_step) {
    return this.source.records("texts", this.run, { name: this.name, limit, before_step });
  }

  // Loads the latest page, and from then on what came after it.
  refresh = reporting(async () => {
    if (!this.root.open) return;
    const last = this.chunks.at(-1)?.step;
    let page = await this.fetch(last === undefined ? PAGE : FEW);
    if (last === undefined) this.earlier.hidden = page.length < PAGE;
    const fresh = [...page];
    while (page.length && page.at(-1).step > last) fresh.push(...(page = await this.fetch(PAGE, page.at(-1).step)));
    this.merge(fresh);
  });

  async loadEarlier() {
    const page = await this.fetch(PAGE, this.chunks[0].step);
    this.earlier.hidden = page.length < PAGE;
    this.merge(page);
  }

  async save() {
    await this.refresh();
    while (!this.earlier.hidden) await this.loadEarlier();
    download(`${this.title}.txt`, this.text);
  }

  merge(fresh) {
    const known = new Map([...this.chunks, ...fresh].map((chunk) => [chunk.step, chunk]));
    if (known.size > this.chunks.length || !known.size) {
      this.chunks = [...known.values()].sort((a, b) => a.step - b.step);
      this.fill();
    }
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
