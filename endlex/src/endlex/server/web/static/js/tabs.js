// Tabs in the usual pattern: one tab stop, arrows move, the address remembers which.

import { el, replaceContent } from "./dom.js";

// `tabs`: [{id, label, count, optional, build() -> element}]; a tab's content is built when first opened,
// and an optional one is shown from the first thing that it counts.
export function tabList(tabs, label) {
  const built = new Map();
  const panel = el("div", { class: "panel", role: "tabpanel", id: "panel" });
  const buttons = tabs.map((tab) =>
    el("button", { type: "button", role: "tab", class: "tab", hidden: tab.optional && !tab.count, id: `tab-${tab.id}`, "aria-controls": "panel", onclick: () => open(tab.id, true) }, tab.label, el("span", { class: "count" }, String(tab.count ?? ""))),
  );
  const bar = el("div", { class: "tabs", role: "tablist", "aria-label": label }, buttons);
  bar.addEventListener("keydown", (event) => {
    const shown = buttons.filter((button) => !button.hidden);
    const here = shown.indexOf(document.activeElement);
    const place = { ArrowLeft: here - 1, ArrowRight: (here + 1) % shown.length, Home: 0, End: -1 }[event.key];
    if (place === undefined) return;
    event.preventDefault();
    shown.at(place).focus();
    shown.at(place).click();
  });
  const open = (id, remembered) => {
    const tab = tabs.find((item, index) => item.id === id && !buttons[index].hidden) || tabs[0];
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
      buttons[index].querySelector(".count").textContent = String(count);
      buttons[index].hidden = tabs[index].optional && !count;
    },
  };
}
