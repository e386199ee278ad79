// A run's page while the server is there: loads it, then follows its events.

import { ROOT, listLink } from "./address.js";
import { ApiSource, subscribe } from "./api.js";
import { el, fail, replaceContent, throttle } from "./dom.js";
import { bindKeys, moveFocus } from "./keys.js";
import { fillHeader } from "./page_header.js";
import { RunView } from "./run_view.js";

async function openRun() {
  const id = decodeURIComponent(location.pathname.slice(ROOT.length).split("/").filter(Boolean)[1] || "");
  const main = document.getElementById("main");
  const source = new ApiSource();
  fillHeader([["Runs", listLink()], [id]]);
  try {
    const view = new RunView(source, await source.run(id), main);
    const refresh = throttle(() => view.refresh(), 4000);
    bindKeys({
      "/": ["filter charts", () => document.querySelector(".panel input[type=search]")?.focus()],
      j: ["next chart", () => moveFocus(".chart-body", 1)],
      k: ["chart before", () => moveFocus(".chart-body", -1)],
      Escape: ["show all of the charts", () => view.showAll()],
    });
    subscribe(id, (kind, data) => (view.onEvent(kind, data), refresh()), () => view.onReturn());
  } catch (error) {
    fail(error);
    const text = error.status === 404 ? `There is no run ${id}.` : error.message;
    replaceContent(main, el("div", { class: "empty" }, el("h2", {}, text), el("a", { href: listLink() }, "All runs")));
  }
}

openRun();
