// What a run printed, what it was (commit, changes, packages), and the exception that ended it.

import { debounce, download, el, fail, replaceContent } from "./dom.js";

const MOST = 1000; // pieces of a text
const OPEN = ["run/exception", "run/console"];

export function logView(source, run, names) {
  const order = (name) => (OPEN.indexOf(name) + OPEN.length + 1) % (OPEN.length + 1);
  const parts = [...names].sort((a, b) => order(a) - order(b)).map((name) => part(source, run, name));
  return el("section", { "aria-label": "Log", class: "records" }, parts);
}

function part(source, run, name) {
  const lines = el("pre", { class: "sample" }, "Loading…");
  let text = "";
  const fill = () => {
    const wanted = filter.value.toLowerCase();
    replaceContent(lines, wanted ? text.split("\n").filter((line) => line.toLowerCase().includes(wanted)).join("\n") : text);
    lines.scrollTop = lines.scrollHeight;
  };
  const filter = el("input", { type: "search", placeholder: "Filter lines", "aria-label": `Filter lines of ${name}`, oninput: debounce(fill, 100) });
  const save = el("button", { type: "button", class: "button", onclick: () => download(`${name.replace("run/", "")}.txt`, text) }, "Save");
  const root = el("details", { class: "record", open: OPEN.includes(name) }, el("summary", {}, name.replace("run/", "")), el("div", { class: "toolbar" }, filter, save), lines);
  const load = async () => {
    try {
      const { texts } = await source.texts(run, { name, limit: MOST });
      text = texts.filter((one) => one.name === name).sort((a, b) => a.step - b.step).map((one) => one.text).join("");
      fill();
    } catch (error) {
      fail(error);
    }
  };
  root.addEventListener("toggle", () => root.open && !text && load());
  return root;
}
