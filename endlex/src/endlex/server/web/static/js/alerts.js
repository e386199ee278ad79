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
    const turn = (this.turn = {});
    const { alerts } = await this.source.alerts(this.run);
    if (turn === this.turn) replaceContent(this.root, alerts.map((alert) => this.item(alert)));
  });

  item(alert) {
    const when = alert.opened;
    const dismiss = reporting(async () => {
      await request(`/alerts/${encodeURIComponent(alert.id)}/dismiss`, { method: "POST" });
      note.remove();
    });
    const time = el("time", { class: "quiet", title: formatDate(when) }, formatAgo(when));
    const close = this.source.live && el("button", { type: "button", class: "link", onclick: dismiss }, "Dismiss");
    const text = [el("strong", {}, alert.kind), el("span", { class: "alert-text" }, alert.message)];
    const note = el("div", { class: "alert", role: "alert", data: { kind: alert.kind } }, text, time, close);
    return note;
  }
}
