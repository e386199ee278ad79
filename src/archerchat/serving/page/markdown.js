// Markdown as DOM nodes. What a model says is text until marked has read it and DOMPurify has let it
// through: HTML in it stays text, and a link leads to the web or to mail. The libraries come from npm
// with the package's build (hatch_build.py); without them answers are shown as they are.

const { marked } = await import("./vendor/marked.js").catch(() => ({}));
await import("./vendor/purify.js").catch(() => null);
const purify = globalThis.DOMPurify;
const rarely = {}; // libraries that few answers need, by name
const load = (name) => (rarely[name] ??= import(`./vendor/${name}.js`).catch(() => null));

const ALLOWED = {
  ALLOWED_TAGS: "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul".split(" "),
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(https?:\/\/|mailto:)/i,
  RETURN_DOM_FRAGMENT: true,
};
const FORMULA = /^(?:\$\$([^$]+)\$\$|\\\[([^]+?)\\\]|\\\((.+?)\\\)|\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\d\w]))/;
const MAX_CHARACTERS = 200000;

const escape = (text) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
marked?.use({
  breaks: true,
  renderer: { html: ({ text, block }) => (block ? `<p>${escape(text)}</p>` : escape(text)), image: ({ raw }) => escape(raw) },
  extensions: [{
    name: "formula",
    level: "inline",
    start: (text) => text.match(/\$|\\[[(]/)?.index,
    tokenizer(text) {
      const found = FORMULA.exec(text);
      return found && { type: "formula", raw: found[0], text: found.slice(1).join(""), display: Boolean(found[1] ?? found[2]) };
    },
    renderer: ({ text, display }) => `<span class="formula${display ? " display" : ""}">${escape(text)}</span>`,
  }],
});

export function element(tag, content = [], attributes = {}) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) typeof value === "function" ? (made[name] = value) : made.setAttribute(name, value);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

export function markdown(text) {
  if (!marked || !purify || text.length > MAX_CHARACTERS) return [element("p", text, { class: "plain" })];
  const found = purify.sanitize(marked.parse(text), ALLOWED);
  for (const link of found.querySelectorAll("a")) {
    if (link.hasAttribute("href")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow" });
    else link.replaceWith(...link.childNodes);
  }
  for (const code of found.querySelectorAll("pre > code")) {
    load("highlight").then((library) => library?.default.getLanguage(/language-(\S+)/.exec(code.className)?.[1]) && library.default.highlightElement(code));
  }
  for (const formula of found.querySelectorAll(".formula")) {
    const displayMode = formula.classList.contains("display");
    load("katex").then(() => globalThis.katex?.render(formula.textContent, formula, { displayMode, output: "mathml", throwOnError: false, maxExpand: 100, maxSize: 10 }));
  }
  return [...found.children];
}
