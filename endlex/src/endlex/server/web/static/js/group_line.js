// Runs that belong together as one line: their mean at every x, and the band around it.

import { EMPTY } from "./series_loader.js";

const MOST_POINTS = 3000;

export class GroupLine {
  // `members` are `ChartLine`s; `band` is "range" (lowest to highest) or "error" (standard error).
  constructor({ label, hue, members, band }) {
    Object.assign(this, { label, hue, members, band });
    this.run = `group:${label}`;
    this.dash = members[0].dash;
    this.cached = { lines: [], parts: [], series: EMPTY, smoothed: null };
  }

  get loaded() {
    return this.members.some((line) => line.loaded);
  }

  get hidden() {
    return this.members.every((line) => line.hidden);
  }

  shown(view) {
    const usable = this.members.filter((line) => line.loaded && !line.hidden);
    const lines = usable.filter((line) => line.shown(view).x.length);
    const parts = lines.map((line) => line.shown(view));
    const { cached } = this;
    if (parts.length !== cached.parts.length || parts.some((part, i) => part !== cached.parts[i])) {
      this.cached = { lines, parts, series: merge(parts, this.band), smoothed: null };
    }
    return this.cached.series;
  }

  average(series, strength) {
    return this.smoothed(series, strength).y;
  }

  // The band's edges, smoothed as the mean is.
  edges(series, strength) {
    return strength > 0 ? this.smoothed(series, strength) : series;
  }

  // The members' averages, merged: what is a spike in one must not show in the mean.
  smoothed(series, strength) {
    const { cached } = this;
    if (cached.smoothed?.strength !== strength || cached.series !== series) {
      const averages = cached.lines.map((line, i) => ({ ...cached.parts[i], y: line.average(cached.parts[i], strength) }));
      cached.smoothed = { strength, ...merge(averages, this.band) };
    }
    return cached.smoothed;
  }
}

function merge(parts, band) {
  if (!parts.length) return { ...EMPTY, low: EMPTY.y, high: EMPTY.y };
  const x = unionOf(parts);
  const size = x.length;
  const [count, sum, squares] = [0, 1, 2].map(() => new Float64Array(size));
  const low = new Float64Array(size).fill(Infinity);
  const high = new Float64Array(size).fill(-Infinity);
  for (const part of parts) {
    let right = 0;
    for (let i = 0; i < size; i++) {
      while (right < part.x.length && part.x[right] < x[i]) right += 1;
      const value = valueAt(part, right, x[i]);
      if (!Number.isFinite(value)) continue;
      count[i] += 1;
      sum[i] += value;
      squares[i] += value * value;
      if (value < low[i]) low[i] = value;
      if (value > high[i]) high[i] = value;
    }
  }
  const y = sum.map((total, i) => total / count[i]);
  if (band === "error") {
    for (let i = 0; i < size; i++) {
      const variance = count[i] > 1 ? Math.max(0, squares[i] - count[i] * y[i] * y[i]) / (count[i] - 1) : 0;
      const error = Math.sqrt(variance / count[i]);
      low[i] = y[i] - error;
      high[i] = y[i] + error;
    }
  }
  return { x, y, low, high, count: size, sampled: parts.some((part) => part.sampled), nonfinite: parts.flatMap((part) => part.nonfinite) };
}

function unionOf(parts) {
  const all = Float64Array.from(new Set(parts.flatMap((part) => [...part.x]))).sort();
  const every = Math.ceil(all.length / MOST_POINTS);
  return every > 1 ? all.filter((_, i) => i % every === 0 || i === all.length - 1) : all;
}

// A series' value between its points: on the line that is drawn; outside of them there is none.
function valueAt({ x, y }, right, at) {
  if (right >= x.length || (right === 0 && x[0] > at)) return NaN;
  if (x[right] === at) return y[right];
  const left = right - 1;
  return y[left] + ((at - x[left]) / (x[right] - x[left])) * (y[right] - y[left]);
}
