// Open alerts of a run, above everything else, until somebody dismisses them.

import { request } from "./api.js";
import { el, fail, replaceContent } from "./dom.js";
import { formatAgo, formatDate } from "./format.js";

export class AlertBanner {
  constructor(source, run) {
    Object.assign(this, { source, run });
    this.root = el("section", { class: "alerts", "aria-label": "Alerts", "aria-live": "polite" });
  }

  async refresh() {
    try {
      const { alerts } = await this.source.alerts(this.run);
      replaceContent(this.root, alerts.map((alert) => this.item(alert)));
    } catch (error) {
      fail(error);
    }
  }

  item(alert) {
    const when = alert.opened;
    const dismiss = async () => {
      try {
        await request(`/alerts/${encodeURIComponent(alert.id)}/dismiss`, { method: "POST" });
        note.remove();
      } catch (error) {
        fail(error);
      }
    };
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
