// A run's checkpoints: how big, whether the server has verified every file, and where to get them.

import { el, replaceContent, reporting } from "./dom.js";
import { flatten, formatBytes, formatDate, formatInteger, formatValue } from "./format.js";

const STATES = {
  published: ["good", "✓ verified", "Every file's SHA-256 matches what was saved"],
  verifying: ["busy", "verifying", "The server is hashing the files; not yet safe to rely on"],
  announced: ["warn", "not here yet", "Saved on the training machine; the server has not got it"],
  incomplete: ["warn", "incomplete", "Parts are still missing"],
  failed: ["bad", "✕ failed", "The hashes do not match; the checkpoint is not published"],
};

export function checkpointsView(source, run, checkpoints) {
  if (!checkpoints.length) return el("p", { class: "quiet pad" }, "No checkpoints yet.");
  const newest = [...checkpoints].sort((a, b) => b.step - a.step || b.created - a.created);
  return el(
    "section",
    { "aria-label": "Checkpoints", class: "records" },
    newest.map((checkpoint) => card(source, run, checkpoint)),
  );
}

function card(source, run, checkpoint) {
  const [kind, word, title] = STATES[checkpoint.state] || ["warn", checkpoint.state, ""];
  const files = el("details", { class: "files" }, el("summary", {}, source.live ? "Files" : "Details"));
  files.addEventListener("toggle", () => files.open && !files.dataset.filled && fill(files, source, run, checkpoint));
  return el(
    "article",
    { class: "record checkpoint", data: { name: checkpoint.name } },
    el(
      "header",
      {},
      el("h3", {}, checkpoint.name),
      (checkpoint.aliases || []).map((alias) => el("span", { class: "tag" }, alias)),
      el("span", { class: `badge badge-${kind}`, title }, word),
      el("span", { class: "spring" }),
      el("span", { class: "quiet" }, `step ${formatInteger(checkpoint.step)} · ${formatBytes(checkpoint.bytes)} · ${formatDate(checkpoint.created)}`),
    ),
    checkpoint.error && el("p", { class: "bad" }, checkpoint.error),
    files,
  );
}

const fill = reporting(async (box, source, run, checkpoint) => {
  const known = source.live && checkpoint.state !== "announced";
  const manifest = known ? await source.checkpoint(run, checkpoint.name) : {};
  const published = checkpoint.state === "published" && source.live;
  const rows = (manifest.files || []).map((file) =>
    el(
      "tr",
      {},
      el("td", {}, published ? el("a", { href: source.fileUrl(run, checkpoint.name, file.path), download: "" }, file.path) : file.path),
      el("td", { class: "number" }, formatBytes(file.bytes)),
      el("td", {}, el("code", { title: file.sha256 }, (file.sha256 || "").slice(0, 12))),
    ),
  );
  const metadata = flatten(checkpoint.metadata || {}).map(([key, value]) => el("div", { class: "config-row" }, el("dt", {}, key), el("dd", {}, formatValue(value))));
  const head = el("tr", {}, ["File", "Size", "SHA-256"].map((name) => el("th", { scope: "col" }, name)));
  box.dataset.filled = "true";
  replaceContent(
    box,
    box.querySelector("summary"),
    rows.length > 0 && el("div", { class: "table-scroll" }, el("table", { class: "plain" }, el("thead", {}, head), el("tbody", {}, rows))),
    metadata.length > 0 && el("dl", { class: "config" }, metadata),
    !rows.length && !metadata.length && el("p", { class: "quiet" }, "Nothing more is known."),
  );
});
