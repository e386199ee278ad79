// Tabs in the usual pattern: one tab stop, arrows move, the address remembers which.

import { el, replaceContent } from "./dom.js";

// `tabs`: [{id, label, count, build() -> element}]; a tab's content is built when first opened.
export function tabList(tabs, label) {
  const built = new Map();
  const panel = el("div", { class: "panel", role: "tabpanel", id: "panel" });
  const buttons = tabs.map((tab) =>
    el("button", { type: "button", role: "tab", class: "tab", id: `tab-${tab.id}`, "aria-controls": "panel", onclick: () => open(tab.id, true) }, tab.label, el("span", { class: "count" }, String(tab.count ?? ""))),
  );
  const bar = el("div", { class: "tabs", role: "tablist", "aria-label": label }, buttons);
  bar.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -tabs.length, End: tabs.length }[event.key];
    if (!move) return;
    event.preventDefault();
    const here = buttons.indexOf(document.activeElement);
    const next = Math.abs(move) === 1 ? (here + move + tabs.length) % tabs.length : move < 0 ? 0 : tabs.length - 1;
    buttons[next].focus();
    open(tabs[next].id, true);
  });
  const open = (id, remembered) => {
    const tab = tabs.find((item) => item.id === id) || tabs[0];
    tabs.forEach((item, index) => {
      const on = item === tab;
      buttons[index].setAttribute("aria-selected", String(on));
      buttons[index].tabIndex = on ? 0 : -1;
      if (on) buttons[index].scrollIntoView({ block: "nearest", inline: "nearest" });
    });
    if (!built.has(tab.id)) built.set(tab.id, tab.build());
    panel.setAttribute("aria-labelledby", `tab-${tab.id}`);
    replaceContent(panel, built.get(tab.id));
    if (remembered) history.replaceState(null, "", `${location.search}#${tab.id}`);
  };
  addEventListener("hashchange", () => open(location.hash.slice(1), false));
  return {
    bar,
    panel,
    open,
    setCount: (id, count) => {
      const index = tabs.findIndex((tab) => tab.id === id);
      if (index >= 0) buttons[index].querySelector(".count").textContent = String(count);
    },
  };
}
