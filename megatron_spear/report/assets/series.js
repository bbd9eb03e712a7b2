// Lines of numbers: smoothing, thinning, stacking.

/** Mean of the last `window` values at each place, of fewer at the start.
 *
 * Each window is summed for itself: a sum that goes on would carry its rounding along.
 */
const movingAverage = (values, window) =>
  values.map((_, place) => {
    const last = values.slice(Math.max(0, place + 1 - window), place + 1);
    return last.reduce((total, value) => total + value, 0) / last.length;
  });

/** A line with smoothed values (and band), and what was measured as `raw`. */
const smoothed = (line, window) => {
  if (window < 2 || line.values.length < 3) return line;
  const smooth = (values) => (values ? movingAverage(values, window) : values);
  return {
    ...line,
    values: smooth(line.values),
    low: smooth(line.low),
    high: smooth(line.high),
    raw: line.low ? undefined : line.values,
  };
};

const MAX_POINTS = 2000;

/** Places of the points to draw: all, or of each stretch the lowest and the highest. */
const thinned = (values) => {
  if (values.length <= MAX_POINTS) return values.map((_, place) => place);
  const places = [];
  const size = values.length / (MAX_POINTS / 2);
  for (let from = 0; from < values.length; from += size) {
    const stretch = [Math.floor(from), Math.min(values.length, Math.floor(from + size))];
    let [low, high] = [stretch[0], stretch[0]];
    for (let place = stretch[0]; place < stretch[1]; place += 1) {
      if (values[place] < values[low]) low = place;
      if (values[place] > values[high]) high = place;
    }
    places.push(...(low === high ? [low] : [Math.min(low, high), Math.max(low, high)]));
  }
  return places;
};

/** Lines on top of each other, at all their steps: each gets `base` and has the sum in `values`. */
const stacked = (lines) => {
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  let base = steps.map(() => 0);
  return lines.map((line) => {
    const known = new Map(line.steps.map((step, place) => [step, line.values[place]]));
    const own = steps.map((step) => known.get(step) ?? 0);
    const sums = own.map((value, place) => value + base[place]);
    const result = { ...line, steps, values: sums, base, own };
    base = sums;
    return result;
  });
};

/** A path through points [x, y]; null makes a gap. */
const pathThrough = (points) => {
  let pen = 'M';
  const parts = [];
  for (const point of points) {
    if (point === null) {
      pen = 'M';
    } else {
      parts.push(`${pen}${point[0].toFixed(1)} ${point[1].toFixed(1)}`);
      pen = 'L';
    }
  }
  return parts.join('');
};
