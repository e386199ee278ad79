// The processes that wrote a run, and how much of each journal the server has.

import { el } from "./dom.js";
import { formatAgo, formatBytes, formatDate } from "./format.js";
import { statusPill } from "./status.js";

export function sessionsView(sessions) {
  if (!sessions.length) return el("p", { class: "quiet pad" }, "No sessions.");
  const head = el("tr", {}, ["Session", "Kind", "State", "Journal held", "Damaged lines", "Last seen"].map((name) => el("th", { scope: "col" }, name)));
  const body = sessions.map((session) =>
    el(
      "tr",
      {},
      el("td", {}, el("code", {}, session.session)),
      el("td", {}, session.kind || ""),
      el("td", {}, statusPill(session.status)),
      el("td", { class: "number" }, formatBytes(session.offset)),
      el("td", { class: session.damaged_lines ? "number bad" : "number" }, String(session.damaged_lines ?? 0)),
      el("td", { title: formatDate(session.last_seen) }, formatAgo(session.last_seen)),
    ),
  );
  return el("div", { class: "table-scroll" }, el("table", { class: "plain" }, el("thead", {}, head), el("tbody", {}, body)));
}
