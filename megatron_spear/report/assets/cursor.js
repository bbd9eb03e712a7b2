// The cursor of a chart: a step, and what each line has there.

const nearest = (steps, wanted) => {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - steps[low - 1] < steps[low] - wanted ? low - 1 : low;
};

/** What a line has at a step, in words; null where it has nothing. */
const valueAt = (line, step, isStack) => {
  const place = line.steps.indexOf(step);
  if (place < 0 || line.faint) return null;
  const own = isStack ? line.own[place] : line.values[place];
  const words = [`${shown(line.label)}: ${number(own)}`];
  if (line.raw) words.push(`(as measured ${number(line.raw[place])})`);
  if (line.low) words.push(`(${number(line.low[place])} to ${number(line.high[place])})`);
  return { words: words.join(' '), height: line.values[place], place: line.place };
};

/** Give a drawing its cursor. Left and Right move it by a step, Home and End to the ends.
 *
 * Returned is what a drawing that replaces this one needs to have it at the same step.
 */
const addCursor = (svg, spec, layers, x, y, fits) => {
  const steps = [...new Set(layers.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const mark = draw('g', { class: 'cursor' });
  svg.append(mark);
  let at = -1;
  const point = (place) => {
    at = place;
    mark.replaceChildren();
    if (place < 0) return hideTip();
    const step = steps[place];
    const found = layers.map((line) => valueAt(line, step, spec.stacked)).filter(Boolean);
    const stem = draw('line', { x1: x.at(step), x2: x.at(step), y1: MARGIN.top,
      y2: HEIGHT - MARGIN.bottom });
    mark.append(stem);
    for (const { height, place: line } of found.filter((f) => fits(f.height))) {
      const dot = draw('circle', { cx: x.at(step), cy: y.at(height), r: 4 });
      dot.style.fill = colour(line);
      mark.append(dot);
    }
    const lines = spec.stacked ? found.reverse() : found;
    const unit = spec.unit ? ` (${spec.unit})` : '';
    return showTip(stem, [`step ${step}${unit}`, ...lines.map((f) => f.words)].join('\n'));
  };
  const follow = (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = event.clientX - box.left;
    const [first, last] = [x.at(steps[0]), x.at(steps[steps.length - 1])];
    const share = last === first ? 0 : (pixel - first) / (last - first);
    point(nearest(steps, steps[0] + share * (steps[steps.length - 1] - steps[0])));
  };
  const keys = {
    ArrowRight: () => Math.min(steps.length - 1, at + 1),
    ArrowLeft: () => Math.max(0, at - 1),
    Home: () => 0,
    End: () => steps.length - 1,
    Escape: () => -1,
  };
  svg.addEventListener('pointermove', follow);
  svg.addEventListener('pointerdown', follow);
  svg.addEventListener('pointerleave', () => point(-1));
  svg.addEventListener('blur', () => point(-1));
  svg.addEventListener('keydown', (event) => {
    if (!keys[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    point(keys[event.key]());
  });
  return {
    step: () => steps[at],
    moveTo: (step) => {
      if (steps.includes(step)) point(steps.indexOf(step));
    },
  };
};
