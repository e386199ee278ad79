// Text that becomes a field when it is clicked: Enter or leaving it saves, Escape gives up.

import { el, fail, replaceContent } from "./dom.js";

export function editableText(value, { label, empty, onsave, multiline = false, className = "" }) {
  const root = el("span", { class: `editable ${className}` });
  let current = value || "";
  const show = () => {
    const text = current || empty;
    const button = el(
      "button",
      { type: "button", class: current ? "editable-text" : "editable-text quiet", title: `Edit ${label}`, "aria-label": `${label}: ${text}. Edit`, onclick: edit },
      text,
    );
    replaceContent(root, button);
  };
  const edit = () => {
    const field = el(multiline ? "textarea" : "input", { class: "editable-field", value: current, "aria-label": label, rows: multiline ? 4 : undefined });
    let done = false;
    const end = async (save) => {
      if (done) return;
      done = true;
      const next = field.value.trim();
      const before = current;
      if (save && next !== before) current = next;
      show();
      if (current === before) return;
      try {
        await onsave(next);
      } catch (error) {
        current = before;
        show();
        fail(error);
      }
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") end(false);
      if (event.key === "Enter" && (!multiline || event.ctrlKey || event.metaKey)) end(true);
    });
    replaceContent(root, field);
    field.focus();
    field.select();
  };
  show();
  return root;
}

export function editableTags(tags, { onsave, onpick }) {
  const root = el("span", { class: "editable tags" });
  let current = [...(tags || [])];
  const show = () => {
    const chips = current.map((tag) => el("button", { type: "button", class: "tag", title: `Show runs tagged ${tag}`, onclick: () => onpick?.(tag) }, tag));
    const pencil = el("button", { type: "button", class: "editable-text quiet tag-edit", "aria-label": `Edit tags: ${current.join(", ") || "none"}`, title: "Edit tags", onclick: edit }, current.length ? "✎" : "+ tag");
    replaceContent(root, chips, pencil);
  };
  const edit = () => {
    const line = editableText(current.join(", "), {
      label: "tags, separated by commas",
      empty: "",
      onsave: async (text) => {
        const next = [...new Set(text.split(",").map((tag) => tag.trim()).filter(Boolean))];
        await onsave(next);
        current = next;
        show();
      },
    });
    replaceContent(root, line);
    line.querySelector("button").click();
    line.querySelector(".editable-field").addEventListener("blur", () => setTimeout(show, 0));
  };
  show();
  return root;
}
