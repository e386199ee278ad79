// The exponential moving average of what is on the screen, corrected for its start. A spike of a few
// points, far outside of what the run does, does not count: one would stay in the average for long.

// A point's weight fades by `strength` per unit of x, where the whole run is `UNITS` units long; a
// gap of more than one unit counts as one. So a series of up to a thousand points gets the plain
// average over points, and one of millions, of which a chart holds a sample, the same curve at
// every zoom.
const UNITS = 1000;
const TAIL = 0.025;
const FAR = 3; // times the width of the middle 95 %, beyond it
const SPIKE_POINTS = 3;

// Where the values of a series end and spikes begin: [low, high].
export function fenceOf(y) {
  const sorted = Float64Array.from(y.filter(Number.isFinite)).sort();
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const far = FAR * (at(1 - TAIL) - at(TAIL));
  return far > 0 ? [at(TAIL) - far, at(1 - TAIL) + far] : [-Infinity, Infinity];
}

// Whether the points from `index` on are a spike; then how many they are, else 0.
function spikeAt(y, index, [low, high]) {
  let past = index;
  while (past < y.length && (y[past] < low || y[past] > high)) past += 1;
  return past - index <= SPIKE_POINTS ? past - index : 0;
}

export function smooth(x, y, strength, wholeRange, fence) {
  const result = new Float64Array(y.length);
  const perUnit = wholeRange > 0 ? UNITS / wholeRange : Infinity;
  const fade = Math.log(strength);
  let sum = 0;
  let weight = 0;
  let previous = NaN;
  let inRange = true;
  for (let i = 0; i < y.length; i++) {
    const value = y[i];
    const inside = value >= fence[0] && value <= fence[1];
    if (inside) inRange = true;
    const spike = !inside && inRange ? spikeAt(y, i, fence) : 0;
    if (spike) {
      result.fill(weight ? sum / weight : NaN, i, i + spike);
      i += spike - 1;
      continue;
    }
    if (!Number.isFinite(value)) {
      result[i] = NaN;
      continue;
    }
    inRange = inside;
    const gap = Math.min(1, Math.max(0, (x[i] - previous) * perUnit));
    const decay = Number.isNaN(previous) ? 0 : Math.exp(fade * gap);
    // Dividing by the weights' sum takes out the bias towards the start.
    sum = sum * decay + value * (1 - strength);
    weight = weight * decay + (1 - strength);
    result[i] = sum / weight;
    previous = x[i];
  }
  return result;
}
