// Open alerts of a run, above everything else, until somebody dismisses them.

import { request } from "./api.js";
import { el, replaceContent, reporting } from "./dom.js";
import { formatAgo, formatDate } from "./format.js";

export class AlertBanner {
  constructor(source, run) {
    Object.assign(this, { source, run });
    this.root = el("section", { class: "alerts", "aria-label": "Alerts", "aria-live": "polite" });
  }

  refresh = reporting(async () => {
    const { alerts } = await this.source.alerts(this.run);
    replaceContent(this.root, alerts.map((alert) => this.item(alert)));
  });

  item(alert) {
    const when = alert.opened;
    const dismiss = reporting(async () => {
      await request(`/alerts/${encodeURIComponent(alert.id)}/dismiss`, { method: "POST" });
      note.remove();
    });
    const note = el(
      "div",
      { class: "alert", role: "alert", data: { kind: alert.kind } },
      el("strong", {}, alert.kind),
      el("span", { class: "alert-text" }, alert.message),
      el("time", { class: "quiet", title: formatDate(when) }, formatAgo(when)),
      this.source.live && el("button", { type: "button", class: "link", onclick: dismiss }, "Dismiss"),
    );
    return note;
  }
}
