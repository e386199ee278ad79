// Exchanges a token for a session cookie that scripts cannot read.

import { ROOT } from "./address.js";
import { el, remember, replaceContent } from "./dom.js";
import { fillHeader } from "./page_header.js";

function buildLogin() {
  fillHeader([["Log in"]]);
  const token = el("input", { type: "password", id: "token", name: "token", required: true, autocomplete: "current-password", autofocus: true, spellcheck: false });
  const error = el("p", { class: "bad", role: "alert" });
  const button = el("button", { type: "submit", class: "button primary" }, "Log in");
  const form = el(
    "form",
    { class: "login", method: "post", action: `${ROOT}/api/v1/login`, onsubmit: (event) => (event.preventDefault(), logIn(token.value, button, error)) },
    el("h1", {}, "Log in"),
    el("label", { htmlFor: "token" }, "Token"),
    token,
    button,
    error,
    el("p", { class: "quiet" }, "Make one on the server: ", el("code", {}, "endlex token create NAME --scope read")),
  );
  replaceContent(document.getElementById("main"), form);
  token.focus();
}

async function logIn(token, button, error) {
  button.disabled = true;
  error.textContent = "";
  try {
    const answer = await fetch(`${ROOT}/api/v1/login`, { method: "POST", body: new URLSearchParams({ token: token.trim() }) });
    if (answer.ok) {
      remember("loggedIn", true);
      location.assign(destination());
      return;
    }
    const body = await answer.json().catch(() => ({}));
    error.textContent = body.error || `The server answered ${answer.status}.`;
  } catch {
    error.textContent = "The server does not answer.";
  }
  button.disabled = false;
}

// Only a path of this server: an address given by a stranger leads nowhere else.
function destination() {
  const next = new URLSearchParams(location.search).get("next") || "/";
  const url = new URL(ROOT + next, location.origin);
  const own = url.origin === location.origin && next.startsWith("/") && url.pathname.startsWith(ROOT);
  return own ? url.pathname + url.search + url.hash : `${ROOT}/`;
}

buildLogin();
