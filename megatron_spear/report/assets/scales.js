// From values to places on the paper, and the ticks between.

const MAX_TICKS = 100;

/** Steps of 1, 2 or 5 times a power of ten that lie in low..high; about `wanted` of them. */
const linearTicks = (low, high, wanted, whole = false) => {
  const raw = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const first = Math.ceil(low / step - 1e-9);
  const count = Math.floor(high / step + 1e-9) - first + 1;
  const ticks = [];
  for (let tick = 0; tick < Math.min(count, MAX_TICKS); tick += 1) ticks.push((first + tick) * step);
  return ticks;
};

/** Powers of ten in low..high, thinned to about `wanted`. */
const logTicks = (low, high, wanted) => {
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  const by = Math.max(1, Math.ceil((last - first + 1) / wanted));
  const ticks = [];
  for (let power = first; power <= last; power += by) ticks.push(10 ** power);
  return ticks;
};

/** Whether low..high is one value, but for the rounding of sums. */
const isFlat = (low, high) => high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high));

/** An axis from low..high to start..end: {at(value), ticks}. A flat one gets room on both sides. */
const axisOf = ({ low, high, start, end, log = false, wanted = 5, whole = false }) => {
  if (log) {
    const [a, b] = isFlat(low, high) ? [low / 2, high * 2] : [low, high];
    const [from, to] = [Math.log10(a), Math.log10(b)];
    const scale = (end - start) / (to - from);
    const powers = logTicks(a, b, wanted);
    return {
      at: (value) => start + (Math.log10(value) - from) * scale,
      ticks: powers.length > 1 ? powers : linearTicks(a, b, wanted).filter((tick) => tick > 0),
    };
  }
  const pad = isFlat(low, high) ? Math.abs(low) * 0.1 || 1 : 0;
  const [from, to] = [low - pad, high + pad];
  const scale = (end - start) / (to - from);
  return {
    at: (value) => start + (value - from) * scale,
    ticks: linearTicks(from, to, wanted, whole),
  };
};

/** Lowest and highest of the numbers; null where there is none. */
const extent = (values) => {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value === null || Number.isNaN(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
};

const tickText = (value) => {
  const size = Math.abs(value);
  if (value === 0) return '0';
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (size < 1e-3) return value.toExponential(0).replace('-', '−');
  return String(Number(value.toPrecision(4))).replace('-', '−');
};
