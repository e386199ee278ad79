// The exponential moving average of what is on the screen, corrected for its start.

// A point's weight fades by `strength` per unit of x, where the whole run is `UNITS` units long; a
// gap of more than one unit counts as one. So a series of up to a thousand points gets the plain
// average over points, and one of millions, of which a chart holds a sample, the same curve at
// every zoom.
const UNITS = 1000;

export function smooth(x, y, strength, wholeRange) {
  const result = new Float64Array(y.length);
  const perUnit = wholeRange > 0 ? UNITS / wholeRange : Infinity;
  const fade = Math.log(strength);
  let sum = 0;
  let weight = 0;
  let previous = NaN;
  for (let i = 0; i < y.length; i++) {
    const value = y[i];
    if (!Number.isFinite(value)) {
      result[i] = NaN;
      continue;
    }
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
