// From series to pixels: which points are in view, how far y reaches, and the strokes.

// The index of the first x that is >= `value`.
export function lowerBound(x, value) {
  let low = 0;
  let high = x.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The points in [from, to] and one more on either side, as [first, past the last].
export function visibleSpan(x, from, to) {
  const first = Math.max(0, lowerBound(x, from) - 1);
  let last = lowerBound(x, to);
  while (last < x.length && x[last] === to) last += 1;
  return [first, Math.min(x.length, last + 1)];
}

export function nearestIndex(x, value) {
  const right = lowerBound(x, value);
  if (right === 0) return x.length ? 0 : -1;
  if (right === x.length) return right - 1;
  return value - x[right - 1] <= x[right] - value ? right - 1 : right;
}

// Widens `bounds` ([low, high]) by the finite values in view; on a log axis only positive ones.
export function includeValues(bounds, x, y, from, to, positive, [low, high] = [-Infinity, Infinity]) {
  const first = lowerBound(x, from);
  for (let i = first; i < x.length && x[i] <= to; i++) {
    const value = y[i];
    // Comparisons with NaN are false, so what is not finite changes nothing.
    if (positive && !(value > 0)) continue;
    if (value < low || value > high) continue;
    if (value < bounds[0]) bounds[0] = value;
    if (value > bounds[1]) bounds[1] = value;
  }
}

const BINS = 400;
const OUTLIERS = 0.025;
const WORTH = 3; // times narrower an axis must get before any value is left out

// Narrows `bounds` to leave out the lowest and highest 2.5 % of the values in `spans`, each
// {x, y, from, to}, where that makes the axis a lot clearer; a histogram is exact to a bin, and fast
// enough for every frame.
export function withoutOutliers([low, high], spans, positive) {
  if (!(high > low)) return [low, high];
  const counts = new Uint32Array(BINS);
  const toBin = pixelScale(low, high, 0, BINS, positive);
  let total = 0;
  for (const { x, y, from, to } of spans) {
    for (let i = lowerBound(x, from); i < x.length && x[i] <= to; i++) {
      if (!Number.isFinite(y[i]) || (positive && y[i] <= 0)) continue;
      counts[Math.min(BINS - 1, Math.floor(toBin(y[i])))] += 1;
      total += 1;
    }
  }
  const spared = total * OUTLIERS;
  let first = 0;
  let last = BINS - 1;
  for (let sum = counts[first]; sum <= spared && first < last; ) sum += counts[++first];
  for (let sum = counts[last]; sum <= spared && last > first; ) sum += counts[--last];
  if ((last + 1 - first) * WORTH > BINS) return [low, high];
  const value = positive
    ? (bin) => low * (high / low) ** (bin / BINS)
    : (bin) => low + ((high - low) * bin) / BINS;
  // The bin is wide beside what is left; the values themselves say where the axis ends.
  const bounds = [Infinity, -Infinity];
  const inner = [value(first), value(last + 1)];
  for (const { x, y, from, to } of spans) includeValues(bounds, x, y, from, to, positive, inner);
  return bounds[0] <= bounds[1] ? bounds : inner;
}

// The axis around `bounds`: some air, and never empty.
export function padBounds([low, high], logarithmic) {
  if (!(low <= high)) return logarithmic ? [0.1, 1] : [0, 1];
  if (logarithmic) {
    const factor = low === high ? 2 : (high / low) ** 0.05;
    return [low / factor, high * factor];
  }
  const air = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.06;
  const bottom = low >= 0 && low - air < 0 ? 0 : low - air;
  return [bottom, high + air];
}

// A function from values to canvas pixels.
export function pixelScale(min, max, start, length, logarithmic) {
  if (logarithmic) {
    const low = Math.log10(min);
    const scale = length / (Math.log10(max) - low);
    return (value) => start + (Math.log10(value) - low) * scale;
  }
  const scale = length / (max - min);
  return (value) => start + (value - min) * scale;
}

const MARKED_POINTS = 48;

// Strokes points `first` to `past` of a line. Where several share a column of pixels, only the
// first, lowest, highest and last of them matter to the eye.
export function strokeLine(context, x, y, [first, past], toX, toY, pixels) {
  const dense = past - first > 4 * pixels;
  const state = { open: false, lone: [], column: NaN, low: 0, high: 0, last: 0 };
  context.beginPath();
  for (let i = first; i < past; i++) {
    const px = toX(x[i]);
    const py = toY(y[i]);
    if (!Number.isFinite(py) || !Number.isFinite(px)) {
      endColumn(context, state);
      state.open = false;
      continue;
    }
    if (!dense) {
      const joined = state.open || Number.isFinite(toY(y[i + 1]));
      if (!joined || (i + 1 >= past && !state.open)) state.lone.push(px, py);
      if (state.open) context.lineTo(px, py);
      else context.moveTo(px, py);
      state.open = true;
    } else addToColumn(context, state, Math.round(px), py);
  }
  endColumn(context, state);
  context.stroke();
  if (!dense && past - first <= MARKED_POINTS) {
    for (let i = first; i < past; i++) dot(context, toX(x[i]), toY(y[i]), 2);
  } else for (let i = 0; i < state.lone.length; i += 2) dot(context, state.lone[i], state.lone[i + 1], 2.5);
}

function addToColumn(context, state, column, py) {
  if (column !== state.column) {
    endColumn(context, state);
    if (state.open) context.lineTo(column, py);
    else context.moveTo(column, py);
    Object.assign(state, { column, low: py, high: py });
  }
  if (py < state.low) state.low = py;
  if (py > state.high) state.high = py;
  state.last = py;
  state.open = true;
}

function endColumn(context, state) {
  if (Number.isNaN(state.column)) return;
  if (state.low !== state.high) {
    context.lineTo(state.column, state.low);
    context.lineTo(state.column, state.high);
    context.lineTo(state.column, state.last);
  }
  state.column = NaN;
}

function dot(context, px, py, radius) {
  if (!Number.isFinite(px) || !Number.isFinite(py)) return;
  context.beginPath();
  context.arc(px, py, radius * (window.devicePixelRatio || 1), 0, 2 * Math.PI);
  context.fill();
}

// Fills the area between the edges of a band.
export function fillBand(context, x, low, high, [first, past], toX, toY) {
  context.beginPath();
  for (let i = first; i < past; i++) if (Number.isFinite(high[i])) context.lineTo(toX(x[i]), toY(high[i]));
  for (let i = past - 1; i >= first; i--) if (Number.isFinite(low[i])) context.lineTo(toX(x[i]), toY(low[i]));
  context.fill();
}

function triangle(context, px, apex, base, size) {
  context.moveTo(px, apex);
  context.lineTo(px - size, base);
  context.lineTo(px + size, base);
}

// Marks at the edges where values lie beyond them, once for a few pixels; all marks of a line are one
// path, since each one that is filled by itself costs as much as a line.
export function markOutliers(context, x, y, [first, past], [low, high], toX, box) {
  const size = 3 * (window.devicePixelRatio || 1);
  const last = [-Infinity, -Infinity];
  context.beginPath();
  for (let i = first; i < past; i++) {
    if (y[i] <= high && y[i] >= low) continue;
    const above = y[i] > high ? 1 : 0;
    const px = toX(x[i]);
    if (!Number.isFinite(y[i]) || px - last[above] < 3 * size) continue;
    last[above] = px;
    const edge = above ? box.top : box.top + box.height;
    triangle(context, px, edge, edge + (above ? 1.6 : -1.6) * size, size);
  }
  context.fill();
}

// Marks at the axis what has no place in the plot, each stretch from end to end: NaN and -Infinity
// below, Infinity above.
export function markNonFinite(context, nonfinite, from, to, toX, box) {
  const size = 5 * (window.devicePixelRatio || 1);
  for (const [first, last, kind] of nonfinite) {
    if (last < from || first > to) continue;
    const [left, right] = [toX(Math.max(first, from)), toX(Math.min(last, to))];
    const top = kind === "Infinity";
    const base = top ? box.top : box.top + box.height;
    context.beginPath();
    triangle(context, (left + right) / 2, top ? base : base - 1.6 * size, top ? base + 1.6 * size : base, size);
    context.fill();
    context.fillRect(left, top ? base : base - 3, right - left, 3);
  }
}
