// The bar at the top of every page: the way back, light or dark, logging out.

import { ROOT, listLink } from "./address.js";
import { isDark } from "./colors.js";
import { el, recall, remember, replaceContent } from "./dom.js";

export function fillHeader(crumbs = [], { offline = false } = {}) {
  const header = document.getElementById("top");
  const brand = [el("span", { class: "brand-mark", "aria-hidden": "true" }), "Endlex"];
  replaceContent(
    header,
    offline ? el("span", { class: "brand" }, brand) : el("a", { class: "brand", href: listLink() }, brand),
    el(
      "nav",
      { class: "crumbs", "aria-label": "You are here" },
      crumbs.map(([text, href]) => [
        el("span", { class: "crumb-slash", "aria-hidden": "true" }, "/"),
        href && !offline ? el("a", { href }, text) : el("span", { class: "crumb" }, text),
      ]),
    ),
    el("span", { class: "spring" }),
    !offline && el("span", { class: "stream", role: "img", "aria-label": "Live updates", title: "Live updates" }),
    themeButton(),
    !offline && recall("loggedIn", false) && logoutButton(),
  );
}

function themeButton() {
  const button = el("button", { type: "button", class: "icon-button", onclick: () => switchTheme(button) });
  nameThemeButton(button);
  return button;
}

function nameThemeButton(button) {
  button.textContent = isDark() ? "☀" : "☾";
  const label = isDark() ? "Use light colours" : "Use dark colours";
  button.title = label;
  button.setAttribute("aria-label", label);
}

function switchTheme(button) {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("endlex.theme", theme);
  } catch {
    // Chosen for this page only.
  }
  nameThemeButton(button);
  dispatchEvent(new Event("endlex:theme"));
}

function logoutButton() {
  const logOut = async () => {
    await fetch(`${ROOT}/api/v1/logout`, { method: "POST" });
    remember("loggedIn", false);
    location.assign(`${ROOT}/login`);
  };
  return el("button", { type: "button", class: "button", onclick: logOut }, "Log out");
}
