// What a chart holds of each of its lines: the whole series at the chart's width, and while it is
// zoomed the part in view with a margin, fetched anew for every range that needs finer data.

import { EMPTY, joinSeries } from "./series_loader.js";
import { fenceOf, smooth } from "./smoothing.js";

const MARGIN = 0.5; // of the view's width, on either side: room to pan before data is needed
const COARSER_BY = 2.2; // a view this many times narrower than what was fetched wants finer data
const REFRESH_MS = 900; // between two looks for new points

export class ChartLine {
  // `offset` is taken from x: the run's start, where x is the time since it.
  constructor({ run, metric, label, hue, dash = null, offset = 0 }) {
    Object.assign(this, { run, metric, label, hue, dash, offset });
    this.hidden = false;
    this.whole = null;
    this.detail = null;
    this.averages = new WeakMap();
  }

  get loaded() {
    return this.whole !== null;
  }

  // The best that is here for a view.
  shown(view) {
    const { detail } = this;
    if (view && detail && detail.from <= view.from && view.to <= detail.to) return detail.series;
    return this.whole || EMPTY;
  }

  // The smoothed values of `shown`, kept until the data or the strength changes.
  average(series, strength) {
    let kept = this.averages.get(series);
    if (!kept || kept.strength !== strength) {
      const { x, y } = this.whole || series;
      const range = x.length ? x[x.length - 1] - x[0] : 0;
      if (this.fenced !== y) Object.assign(this, { fenced: y, fence: fenceOf(y) });
      kept = { strength, y: smooth(series.x, series.y, strength, range, this.fence) };
      this.averages.set(series, kept);
    }
    return kept.y;
  }
}

export class ChartData {
  constructor(loader, lines, { x, log, points, onchange, onerror }) {
    Object.assign(this, { loader, lines, x, log, points, onchange, onerror });
    this.view = null;
    this.abort = null; // of the detail that is being fetched
    this.liveAbort = null;
    this.due = new Map(); // by run that has new points, its last step
    this.round = new Map(); // those of `due` that are being fetched
    this.refreshed = -Infinity;
    this.detailTimer = 0;
    this.firstWait = 0;
  }

  get apiX() {
    return this.x === "elapsed" ? "time" : this.x;
  }

  // [first, last] x of all lines that are shown, or null.
  extent(positive) {
    let low = Infinity;
    let high = -Infinity;
    for (const line of this.lines) {
      const x = line.whole?.x;
      if (!x?.length || line.hidden) continue;
      let first = 0;
      while (positive && first < x.length - 1 && !(x[first] > 0)) first += 1;
      low = Math.min(low, x[first]);
      high = Math.max(high, x[x.length - 1]);
    }
    return low <= high ? [low, high] : null;
  }

  async fetch(line, from, to, points, signal) {
    const shift = (value) => (value === undefined ? undefined : value + line.offset);
    const range = { x: this.apiX, from: shift(from), to: shift(to), points, log: this.log || undefined };
    const series = await this.loader.load(line.run, line.metric, range, signal);
    if (line.offset) {
      for (let i = 0; i < series.x.length; i++) series.x[i] -= line.offset;
      series.nonfinite = series.nonfinite.map(([first, last, kind]) => [first - line.offset, last - line.offset, kind]);
    }
    return series;
  }

  // There is new data. A zoomed line may lack its detail now.
  changed() {
    this.onchange();
    if (this.view && !this.abort) this.want(this.view);
  }

  // Fetches the whole of every line that is not here.
  loadWhole() {
    const abort = new AbortController();
    this.wholeAbort?.abort();
    this.wholeAbort = abort;
    for (const line of this.lines) {
      if (line.loaded && !line.stale) continue;
      this.fetch(line, undefined, undefined, this.points, abort.signal).then((series) => {
        Object.assign(line, { whole: series, detail: null, stale: false });
        this.changed();
      }, this.onerror);
    }
  }

  // Fetches finer data for `view` once it has rested for 100 ms, or changed for 300.
  want(view) {
    clearTimeout(this.detailTimer);
    this.view = view;
    if (!view) {
      this.abort?.abort();
      this.abort = null;
      for (const line of this.lines) line.detail = null;
      return;
    }
    const now = performance.now();
    if (!this.firstWait) this.firstWait = now;
    const wait = Math.max(0, Math.min(100, this.firstWait + 300 - now));
    this.detailTimer = setTimeout(() => this.loadDetail(view), wait);
  }

  loadDetail(view) {
    this.firstWait = 0;
    const width = view.to - view.from;
    const from = view.from - MARGIN * width;
    const to = view.to + MARGIN * width;
    const lines = this.lines.filter((line) => !line.hidden && needsDetail(line, view, width));
    if (!lines.length) return;
    this.abort?.abort();
    const abort = new AbortController();
    this.abort = abort;
    const points = this.points * (1 + 2 * MARGIN);
    let left = lines.length;
    for (const line of lines) {
      const fetched = this.fetch(line, from, to, points, abort.signal).finally(() => {
        left -= 1;
        if (!left && this.abort === abort) this.abort = null;
      });
      fetched.then((series) => {
        line.detail = { from, to, series };
        this.changed();
      }, this.onerror);
    }
  }

  // Fetches what came since the last point, or everything where a run went back to earlier steps.
  // What is asked for meanwhile is fetched afterwards, about once a second.
  async refresh(run, lastStep) {
    this.due.set(run, lastStep);
    if (this.liveAbort) return;
    const abort = new AbortController();
    this.liveAbort = abort;
    try {
      while (this.due.size) {
        const rest = this.refreshed + REFRESH_MS - performance.now();
        if (rest > 0) await new Promise((resolve) => setTimeout(resolve, rest));
        if (abort.signal.aborted) return;
        this.refreshed = performance.now();
        [this.round, this.due] = [this.due, new Map()];
        const lines = this.lines.filter((line) => this.round.has(line.run) && line.loaded);
        await Promise.all(lines.map((line) => this.refreshLine(line, this.round.get(line.run), abort.signal)));
        this.round.clear();
        if (lines.length) this.changed();
      }
    } catch (error) {
      if (this.liveAbort === abort) this.missRefresh();
      this.onerror(error);
    } finally {
      if (this.liveAbort === abort) this.liveAbort = null;
    }
  }

  // What was due, or under way, and did not come is fetched with the whole line next time.
  missRefresh() {
    for (const line of this.lines) line.stale ||= this.due.has(line.run) || this.round.has(line.run);
    this.due.clear();
    this.round.clear();
  }

  async refreshLine(line, lastStep, signal) {
    const { x } = line.whole;
    const last = x.length ? x[x.length - 1] : undefined;
    const wentBack = this.x === "step" && last !== undefined && lastStep < last;
    const from = wentBack || x.length > 3 * this.points ? undefined : last;
    const series = await this.fetch(line, from, undefined, this.points, signal);
    line.whole = from === undefined ? series : joinSeries(line.whole, series);
    // A zoomed part that reaches the end is shown until `changed` has fetched it again.
    if (from === undefined) line.detail = null;
    else if (line.detail?.to >= last) line.detail.old = true;
  }

  stop() {
    clearTimeout(this.detailTimer);
    this.missRefresh();
    for (const abort of [this.abort, this.liveAbort, this.wholeAbort]) abort?.abort();
    this.abort = this.liveAbort = null;
  }
}

function needsDetail(line, view, width) {
  const { whole, detail } = line;
  if (!whole?.sampled) return false;
  const covered = detail && detail.from <= view.from && view.to <= detail.to;
  if (covered && detail.old) return true;
  if (!covered) return (whole.x[whole.x.length - 1] - whole.x[0]) / width > 1.2;
  return detail.series.sampled && (detail.to - detail.from) / width > COARSER_BY * (1 + 2 * MARGIN);
}
