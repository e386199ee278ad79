// Markdown as DOM nodes. What a model says reaches the page through textContent alone, so HTML in it
// is text, and a link goes to the web or to mail, or stays text.

const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const INLINE = [
  [/`+([^`]|[^`][\s\S]*?[^`])`+(?!`)/, (m) => element("code", m[1].trim())],
  [/\*\*(?=\S)([\s\S]*?\S)\*\*/, (m) => element("strong", inline(m[1]))],
  [/~~(?=\S)([\s\S]*?\S)~~/, (m) => element("del", inline(m[1]))],
  [/\*(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)|\b_(?=\S)([^_]*?\S)_\b/, (m) => element("em", inline(m[1] ?? m[2]))],
  [/\[([^\]\n]{1,500})\]\(([^\s()]{1,2000})\)/, (m) => link(m[2], m[1]) ?? m[0]],
  [/\bhttps?:\/\/[^\s<>()"']{1,2000}[^\s<>()"'.,;:!?]/, (m) => link(m[0], m[0])],
];
const MAX_INLINE = 20000;

export function element(tag, content = [], attributes = {}) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

function link(address, text) {
  if (!SAFE_LINK.test(address)) return null;
  return element("a", text, { href: address, target: "_blank", rel: "noopener noreferrer nofollow" });
}

function inline(text) {
  const nodes = [];
  if (text.length > MAX_INLINE) return [text];
  while (text) {
    let first = null;
    for (const [pattern, make] of INLINE) {
      const found = pattern.exec(text);
      if (found && (!first || found.index < first.found.index)) first = { found, make };
    }
    if (!first) break;
    nodes.push(text.slice(0, first.found.index), first.make(first.found));
    text = text.slice(first.found.index + first.found[0].length);
  }
  nodes.push(text);
  return nodes.filter((node) => node !== "");
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])\s+/;
const TABLE_RULE = /^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)*\|?\s*$/;
const MAX_DEPTH = 8;

export function markdown(text, depth = 0) {
  const lines = text.split("\n");
  const nodes = [];
  let at = 0;
  const take = (test) => {
    const start = at;
    while (at < lines.length && test(lines[at])) at += 1;
    return lines.slice(start, at);
  };
  while (at < lines.length) {
    const line = lines[at];
    let found;
    if (!line.trim()) {
      at += 1;
    } else if ((found = FENCE.exec(line))) {
      at += 1;
      const body = take((next) => !next.trim().startsWith(found[1]));
      at += 1;
      nodes.push(element("pre", element("code", body.join("\n"))));
    } else if ((found = /^(#{1,6})\s+(.*)/.exec(line))) {
      at += 1;
      nodes.push(element(`h${Math.min(found[1].length, 4)}`, inline(found[2])));
    } else if (/^ {0,3}([-*_])\s*(\1\s*){2,}$/.test(line)) {
      at += 1;
      nodes.push(element("hr"));
    } else if (/^ {0,3}>/.test(line) && depth < MAX_DEPTH) {
      const quoted = take((next) => /^ {0,3}>/.test(next)).map((next) => next.replace(/^ {0,3}> ?/, ""));
      nodes.push(element("blockquote", markdown(quoted.join("\n"), depth + 1)));
    } else if (ITEM.test(line) && depth < MAX_DEPTH) {
      nodes.push(list(take, line, depth));
    } else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "")) {
      nodes.push(table(take((next) => next.includes("|"))));
    } else {
      at += 1;
      const rest = take((next) => next.trim() && !FENCE.test(next) && !/^(#{1,6} | {0,3}>)/.test(next) && !ITEM.test(next));
      const joined = [line, ...rest].flatMap((each, i) => (i ? [element("br"), ...inline(each)] : inline(each)));
      nodes.push(element("p", joined));
    }
  }
  return nodes;
}

function list(take, first, depth) {
  const ordered = /\d/.test(ITEM.exec(first)[2]);
  const items = [];
  for (const line of take((next) => ITEM.test(next) || /^\s+\S/.test(next))) {
    const found = ITEM.exec(line);
    if (found && (!items.length || found[1].length < 2)) items.push([line.slice(found[0].length)]);
    else items.at(-1).push(line.replace(/^ {1,4}/, ""));
  }
  const made = element(ordered ? "ol" : "ul", items.map((item) => {
    const nodes = markdown(item.join("\n"), depth + 1);
    return element("li", nodes.length === 1 && nodes[0].tagName === "P" ? [...nodes[0].childNodes] : nodes);
  }));
  if (ordered) made.setAttribute("start", parseInt(ITEM.exec(first)[2], 10));
  return made;
}

function table(lines) {
  const cells = (line) => line.replace(/^\s*\||\|\s*$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => element("tr", cells(line).map((cell) => element(tag, inline(cell))));
  const body = lines.slice(2).map((line) => row(line, "td"));
  return element("table", [element("thead", row(lines[0], "th")), element("tbody", body)]);
}
