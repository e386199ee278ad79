// What `ApiSource` answers, from the data inside an exported file: no server, no network.

import { lowerBound } from "./plot_lines.js";
import { EMPTY } from "./series_loader.js";

export class LocalSource {
  constructor(data) {
    this.data = data;
  }

  live = false;

  async run() {
    return this.data.run;
  }

  async series(run, metrics, range) {
    const series = {};
    for (const metric of metrics) series[metric] = this.cut(this.onAxis(metric, range.x), range);
    return { run, x: range.x, series };
  }

  // A metric against any x: stored for steps and for time, read off the x metric's curve for others.
  onAxis(metric, x) {
    const stored = this.data.series[metric] || {};
    if (x === "step" || x === "time") return stored[x] || EMPTY;
    const axis = this.data.series[x]?.step;
    const own = stored.step;
    if (!axis?.x.length || !own) return EMPTY;
    const at = (step) => interpolate(axis.x, axis.y, step);
    return { ...own, x: own.x.map(at), nonfinite: own.nonfinite.map(([from, to, kind]) => [at(from), at(to), kind]) };
  }

  cut(series, { from = -Infinity, to = Infinity }) {
    const first = lowerBound(series.x, from);
    let past = first;
    while (past < series.x.length && series.x[past] <= to) past += 1;
    return {
      ...series,
      x: series.x.slice(first, past),
      y: series.y.slice(first, past),
      // What the file holds is all there is: asking for a part gets nothing finer.
      sampled: false,
      nonfinite: series.nonfinite.filter(([first, last]) => last >= from && first <= to),
    };
  }

  // Texts or tables of one name, or all that Endlex did not record itself.
  async records(kind, run, { name, before_step: before = Infinity }) {
    const wanted = (record) => (name ? record.name === name : !record.name.startsWith("run/"));
    return this.data[kind].filter((record) => record.step < before && wanted(record));
  }

  async settings() {
    return this.data.settings;
  }

  async alerts() {
    return { alerts: this.data.alerts };
  }
}

function interpolate(x, y, value) {
  const right = Math.min(lowerBound(x, value), x.length - 1);
  const left = Math.max(0, x[right] > value ? right - 1 : right);
  const width = x[right] - x[left];
  return width > 0 ? y[left] + ((value - x[left]) / width) * (y[right] - y[left]) : y[right];
}
