// A run's state as a word with a dot.

import { el } from "./dom.js";

const STATES = new Set(["running", "finished", "failed", "interrupted", "crashed", "lost"]);

export function statusPill(status) {
  const known = STATES.has(status) ? status : "unknown";
  return el("span", { class: `status status-${known}` }, el("span", { class: "dot", "aria-hidden": "true" }), status || "unknown");
}
