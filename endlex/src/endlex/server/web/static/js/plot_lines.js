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
export function includeValues(bounds, x, y, from, to, positive) {
  const first = lowerBound(x, from);
  for (let i = first; i < x.length && x[i] <= to; i++) {
    const value = y[i];
    // Comparisons with NaN are false, so what is not finite changes nothing.
    if (positive && !(value > 0)) continue;
    if (value < bounds[0]) bounds[0] = value;
    if (value > bounds[1]) bounds[1] = value;
  }
}

const BINS = 400;
const OUTLIERS = 0.025;

// Narrows `bounds` to leave out the lowest and highest 2.5 % of the values in `spans`, each
// {x, y, from, to}; a histogram is exact to a bin, and fast enough for every frame.
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
  const value = positive
    ? (bin) => low * (high / low) ** (bin / BINS)
    : (bin) => low + ((high - low) * bin) / BINS;
  return [value(first), value(last + 1)];
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

// Marks at the axis what has no place in the plot: NaN and -Infinity below, Infinity above.
export function markNonFinite(context, nonfinite, from, to, toX, box) {
  const size = 5 * (window.devicePixelRatio || 1);
  for (const [x, kind] of nonfinite) {
    if (x < from || x > to) continue;
    const px = toX(x);
    const up = kind === "Infinity";
    const base = up ? box.top : box.top + box.height;
    const tip = up ? base + 1.6 * size : base - 1.6 * size;
    context.beginPath();
    context.moveTo(px, up ? base : tip);
    context.lineTo(px - size, up ? tip : base);
    context.lineTo(px + size, up ? tip : base);
    context.closePath();
    context.fill();
  }
}
