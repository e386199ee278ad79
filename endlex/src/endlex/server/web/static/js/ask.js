// A form in a dialog: what is typed, or null where somebody gives up.

import { el } from "./dom.js";

// `fields`: [{name, label, type, value, options, hint, list}]; the types are those of inputs, and
// `select` and `checkbox`. `list` are suggestions.
export function ask(title, fields, { submit = "Save", note } = {}) {
  return new Promise((resolve) => {
    const inputs = new Map(fields.map((field) => [field.name, input(field)]));
    const rows = fields.map((field) => row(field, inputs.get(field.name)));
    const form = el(
      "form",
      { method: "dialog" },
      el("h2", {}, title),
      note && el("p", { class: "quiet" }, note),
      rows,
      el("div", { class: "toolbar" }, el("button", { class: "button primary", value: "ok" }, submit), el("button", { class: "button", value: "", formNoValidate: true }, "Cancel")),
    );
    const dialog = el("dialog", { class: "dialog", "aria-label": title }, form);
    dialog.addEventListener("close", () => {
      const values = [...inputs].map(([name, item]) => [name, item.type === "checkbox" ? item.checked : item.value.trim()]);
      dialog.remove();
      resolve(dialog.returnValue === "ok" ? Object.fromEntries(values) : null);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

function input({ type = "text", value, options, placeholder, required, name, list }) {
  if (type === "select") {
    return el("select", {}, options.map(([key, text]) => el("option", { value: key, selected: key === value }, text)));
  }
  const suggestions = list && `suggest-${name}`;
  const properties = { type, placeholder, required, step: type === "number" ? "any" : undefined, list: suggestions };
  return el("input", { ...properties, ...(type === "checkbox" ? { checked: value } : { value: value ?? "" }) });
}

function row({ label, hint, list, name }, control) {
  const words = list && el("datalist", { id: `suggest-${name}` }, list.map((word) => el("option", { value: word })));
  return el("label", { class: "form-row" }, el("span", {}, label), control, words, hint && el("small", { class: "quiet" }, hint));
}
