// Keys for a page: single letters that work wherever nobody is typing, and `?` to list them.

import { el } from "./dom.js";

const TYPING = "input:not([type=checkbox]):not([type=range]), textarea, select, [contenteditable]";

// `bindings`: {key: [what it does, call]}.
export function bindKeys(bindings) {
  const all = { ...bindings, "?": ["list these keys", () => showKeys(all)] };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (document.querySelector("dialog[open]")) return;
    if (event.target.matches?.(TYPING)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const found = all[event.key];
    if (!found) return;
    event.preventDefault();
    found[1]();
  });
}

function showKeys(bindings) {
  const rows = Object.entries(bindings).map(([key, [what]]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)]);
  const close = el("button", { type: "button", class: "button", onclick: () => dialog.close() }, "Close");
  const dialog = el("dialog", { class: "dialog", "aria-label": "Keys" }, el("h2", {}, "Keys"), el("dl", { class: "keys" }, rows), close);
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

// Moves the focus `by` places along what `selector` finds, from the one that holds it.
export function moveFocus(selector, by) {
  const places = [...document.querySelectorAll(selector)].filter((place) => place.offsetParent);
  const here = places.findIndex((place) => place === document.activeElement || place.contains(document.activeElement));
  const next = places[here < 0 ? 0 : Math.max(0, Math.min(places.length - 1, here + by))];
  next?.focus({ preventScroll: true });
  next?.scrollIntoView({ block: "nearest" });
}
