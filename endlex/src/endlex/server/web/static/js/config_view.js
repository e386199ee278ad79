// A configuration as a tree: searched by key or value, copied whole or line by line.

import { copyText, debounce, el, replaceContent } from "./dom.js";
import { flatten, formatValue } from "./format.js";

export function configView(config) {
  const list = el("dl", { class: "config" });
  const entries = flatten(config || {});
  const render = (text) => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = ([key, value]) => {
      const line = `${key} ${formatValue(value)}`.toLowerCase();
      return words.every((word) => line.includes(word));
    };
    const shown = entries.filter(matches);
    replaceContent(list, shown.length ? rows(shown) : el("p", { class: "quiet pad" }, entries.length ? "No entry matches." : "No configuration was given."));
  };
  const search = el("input", { type: "search", placeholder: "Filter keys and values", "aria-label": "Filter the configuration", oninput: debounce(() => render(search.value), 80) });
  const copy = el("button", { type: "button", class: "button", onclick: () => copyText(JSON.stringify(config, null, 2)) }, "Copy JSON");
  render("");
  return el("section", { "aria-label": "Configuration" }, el("div", { class: "toolbar" }, search, copy), list);
}

// Entries with a common first part stand under one heading.
function rows(entries) {
  const result = [];
  let open = null;
  for (const [key, value] of entries) {
    const dot = key.indexOf(".");
    const section = dot > 0 ? key.slice(0, dot) : "";
    if (section !== open && section) result.push(el("div", { class: "config-section", role: "presentation" }, section));
    open = section;
    const name = section ? key.slice(dot + 1) : key;
    const text = formatValue(value);
    result.push(
      el(
        "div",
        { class: section ? "config-row nested" : "config-row", data: { key } },
        el("dt", {}, name),
        el("dd", {}, text),
        el("button", { type: "button", class: "icon-button", title: "Copy value", "aria-label": `Copy the value of ${key}`, onclick: () => copyText(text) }, "⧉"),
      ),
    );
  }
  return result;
}
