// Numbers, times and sizes as people read them.

const SUFFIXES = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]];

// Up to five significant digits; large numbers with a suffix (k from 10,000 on).
export function formatNumber(value) {
  if (typeof value === "string") return value;
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size >= 1e21 || (size !== 0 && size < 1e-4)) return value.toExponential(3);
  for (const [unit, suffix] of SUFFIXES) {
    if (size >= unit) return formatShort(value / (suffix === "k" ? 1e3 : unit), 4) + suffix;
  }
  return Number.isInteger(value) ? value.toLocaleString("en") : formatShort(value, 5);
}

function formatShort(value, digits) {
  return String(Number(value.toPrecision(digits)));
}

export function formatInteger(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en");
}

export function formatBytes(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  let value = bytes;
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (value < 1024 || unit === "TiB") return `${unit === "B" ? value : value.toFixed(1)} ${unit}`;
    value /= 1024;
  }
  return "–";
}

export function formatDuration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const sign = seconds < 0 ? "−" : "";
  const s = Math.abs(seconds);
  if (s < 60) return `${sign}${s < 10 ? Number(s.toFixed(1)) : Math.round(s)}s`;
  if (s < 3600) return `${sign}${Math.floor(s / 60)}m ${Math.floor(s % 60)}s`;
  if (s < 86400) return `${sign}${Math.floor(s / 3600)}h ${Math.floor((s % 3600) / 60)}m`;
  return `${sign}${Math.floor(s / 86400)}d ${Math.floor((s % 86400) / 3600)}h`;
}

export function formatAgo(unix) {
  if (!unix) return "–";
  const seconds = Date.now() / 1000 - unix;
  if (seconds < 10) return "just now";
  if (seconds < 7 * 86400) return `${formatDuration(seconds).split(" ")[0]} ago`;
  return formatDate(unix).slice(0, 10);
}

export function formatDate(unix) {
  if (!unix) return "–";
  const date = new Date(unix * 1000);
  const two = (number) => String(number).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

// A configuration's value on one line.
export function formatValue(value) {
  if (value === undefined) return "–";
  if (typeof value === "string") return value;
  return JSON.stringify(value);
}

// {"a": {"b": 1}} becomes [["a.b", 1]]; lists stay whole.
export function flatten(value, prefix = "") {
  const plain = value !== null && typeof value === "object" && !Array.isArray(value);
  if (!plain || (prefix && Object.keys(value).length === 0)) return prefix ? [[prefix, value]] : [];
  return Object.entries(value).flatMap(([key, item]) =>
    flatten(item, prefix ? `${prefix}.${key}` : key),
  );
}

// The key of the configuration that a column shows: "config.lr" and "lr" are the same.
export function configKey(column) {
  return column.replace(/^config\./, "");
}

export function formatCsv(rows) {
  const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
  return rows.map((row) => `${row.map(quoted).join(",")}\n`).join("");
}

// Text with runs of digits in the order of their numbers: "d8" before "d12".
const COLLATOR = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

export function compareText(left, right) {
  return COLLATOR.compare(left, right);
}

const words = (choice) => new RegExp(`(?<![a-z])(?:${choice})(?![a-z])`);
const MORE_IS_BETTER = words("acc|[a-z]*accurac(?:y|ies)|[a-z]*scores?|rewards?|(?:chat)?core|f1|bleu|rouge|exact|pass|wins?|recall|precision|(?:pass|success|win)_?rates?|mfu|per_second");
const LESS_IS_BETTER = words("loss|losses|perplexity|ppl|errors?|inaccuracy|seconds");

// Whether a metric is one of which more is better, by the words of its name; of most, such as losses,
// less is, whatever else the name says.
export function isMoreBetter(name) {
  const text = name.replace(/([a-z])([A-Z])/g, "$1_$2").toLowerCase();
  return MORE_IS_BETTER.test(text) && !LESS_IS_BETTER.test(text);
}

export function numeric(value) {
  if (typeof value === "number") return value;
  return { Infinity: Infinity, "-Infinity": -Infinity }[value] ?? NaN;
}
