// One chart: lines, bands or a stack, with a cursor for mouse, finger and keyboard.

const HEIGHT = 230;
const MARGIN = { left: 52, right: 12, top: 10, bottom: 34 };
const NUM_COLOURS = 10;
const MARKED_BELOW = 40;

/** What a reader did to charts, by their keys: lines hidden (labels), axes switched (true = log). */
const hidden = new Map();
const isLog = new Map();

const colour = (place) => `var(--line-${place % NUM_COLOURS})`;

/** Dashes of a line: each ten lines with the same colours have their own. */
const DASHES = ['none', '7 3', '2 2.5', '9 3 2 3'];
const dashes = (place) => DASHES[Math.floor(place / NUM_COLOURS) % DASHES.length];

/** What a line looks like, for the legend. */
const sampleOf = (place) => {
  const stroke = draw('line', { x1: 0, x2: 22, y1: 3, y2: 3 });
  stroke.style.stroke = colour(place);
  stroke.style.strokeDasharray = dashes(place);
  return draw('svg', { class: 'sample', width: 22, height: 6, 'aria-hidden': 'true' }, stroke);
};

/** A chart of spec = {key, title, unit, note, log, from_zero, stacked, lines}.
 *
 * A line is {label, steps, values, low, high, raw, place, faint}; lines of one label share a legend.
 */
const chartOf = (spec) => {
  const off = hidden.get(spec.key) || hidden.set(spec.key, new Set()).get(spec.key);
  const paper = make('div', { class: 'paper' });
  const legend = make('div', { class: 'legend' });
  const remark = make('p', { class: 'note' });
  const isShare = spec.unit.startsWith('share');
  const canLog = !spec.stacked && !isShare && spec.lines.some((line) => line.values.some((value) => value > 0));
  const isLogged = () => Boolean(canLog && (isLog.get(spec.key) ?? spec.log));
  const log = make('button', {
    class: 'small',
    type: 'button',
    text: 'log',
    title: 'logarithmic axis',
    'aria-pressed': String(isLogged()),
    'data-focus': `${spec.key}, log`,
    on: {
      click: () => {
        isLog.set(spec.key, !isLogged());
        log.setAttribute('aria-pressed', isLogged());
        paint();
      },
    },
  });
  let cursor = null;
  const paint = () => {
    const shownLines = spec.lines.filter((line) => !off.has(line.label));
    const isFocused = paper.contains(document.activeElement);
    const step = cursor?.step();
    const painted = paintChart(paper, spec, shownLines, isLogged());
    const { left } = painted;
    cursor = painted.cursor;
    if (isFocused) paper.querySelector('.drawing')?.focus({ preventScroll: true });
    cursor?.moveTo(step);
    const words = [spec.note, left ? `${left} values at or below 0 are not drawn.` : ''];
    remark.textContent = words.filter(Boolean).join(' ');
  };
  const labels = new Map(spec.lines.filter((l) => !l.faint).map((l) => [l.label, l]));
  for (const [label, line] of labels) {
    const button = make(
      'button',
      { type: 'button', class: 'key', 'aria-pressed': String(!off.has(label)), title: 'show or hide',
        'data-focus': `${spec.key}: ${label}` },
      sampleOf(line.place),
      quoted(label),
    );
    button.addEventListener('click', () => {
      if (!off.delete(label)) off.add(label);
      button.setAttribute('aria-pressed', !off.has(label));
      paint();
    });
    legend.append(button);
  }
  const head = make(
    'figcaption',
    {},
    make('h3', {}, quoted(spec.title)),
    make('span', { class: 'unit', text: spec.unit }),
    canLog ? log : null,
  );
  const figure = make('figure', { class: 'chart', 'data-chart': spec.key }, head, paper, legend, remark);
  new ResizeObserver(() => {
    if (paper.clientWidth !== Number(paper.dataset.width)) paint();
  }).observe(paper);
  paint();
  return figure;
};

/** Draw the lines; returns the cursor and how many values a logarithmic axis leaves out. */
const paintChart = (paper, spec, lines, log) => {
  const width = paper.clientWidth || 420;
  paper.dataset.width = paper.clientWidth;
  paper.replaceChildren();
  const layers = spec.stacked ? stacked(lines) : lines;
  const fits = (value) => value !== null && (!log || value > 0);
  const spread = layers.flatMap((line) => [...line.values, ...(line.low || []), ...(line.high || [])]);
  const span = extent(spread.filter(fits));
  const steps = extent(layers.flatMap((line) => line.steps));
  if (!span || !steps) {
    paper.append(make('p', { class: 'empty', text: 'nothing to draw' }));
    return { left: 0, cursor: null };
  }
  const [low, high] = roomy(span, spec, log);
  const x = axisOf({ low: steps[0], high: steps[1], start: MARGIN.left, end: width - MARGIN.right,
    wanted: Math.max(2, width / 90), whole: true });
  const y = axisOf({ low, high, start: HEIGHT - MARGIN.bottom, end: MARGIN.top, log });
  const svg = draw('svg', {
    viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, tabindex: 0, role: 'img',
    class: 'drawing', 'data-focus': `${spec.key}, drawing`,
    'aria-label': `${spec.title}, ${lines.length} lines over steps ${steps[0]} to ${steps[1]}. `
      + 'Arrow keys move the cursor.',
  });
  svg.append(gridOf(x, y, width), ...layers.map((line) => drawLine(line, x, y, fits, spec)));
  paper.append(svg);
  const unfit = (line) => line.values.filter((value) => !fits(value)).length;
  return {
    left: log ? layers.reduce((n, line) => n + unfit(line), 0) : 0,
    cursor: addCursor(svg, spec, layers, x, y, fits),
  };
};

const roomy = ([low, high], spec, log) => {
  if (log) return [low, high];
  const isShare = spec.unit.startsWith('share');
  if (isShare) return [0, Math.min(1, high * 1.08) || 1]; // bands may go beyond, which says nothing
  const from = spec.from_zero ? Math.min(0, low) : low;
  const to = spec.from_zero ? Math.max(0, high) : high;
  const room = (to - from) * 0.05;
  return [from === 0 ? 0 : from - room, to === 0 ? 0 : to + room];
};

const gridOf = (x, y, width) => {
  const grid = draw('g', { class: 'grid' });
  for (const tick of y.ticks) {
    const at = y.at(tick);
    grid.append(
      draw('line', { x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }),
      draw('text', { x: MARGIN.left - 6, y: at + 4, 'text-anchor': 'end', text: tickText(tick) }),
    );
  }
  const bottom = HEIGHT - MARGIN.bottom;
  for (const tick of x.ticks) {
    grid.append(
      draw('text', { x: x.at(tick), y: bottom + 16, 'text-anchor': 'middle', text: tickText(tick) }),
    );
  }
  grid.append(
    draw('text', { x: width - MARGIN.right, y: HEIGHT - 4, 'text-anchor': 'end', text: 'step' }),
  );
  return grid;
};

const inside = (height) => Math.max(MARGIN.top, Math.min(HEIGHT - MARGIN.bottom, height));

const drawLine = (line, x, y, fits, spec) => {
  const group = draw('g', { class: line.faint ? 'faint' : '', 'data-line': line.label });
  const points = (values) =>
    thinned(values).map((p) =>
      (fits(values[p]) ? [x.at(line.steps[p]), inside(y.at(values[p]))] : null));
  // What a logarithmic axis has no place for lies below its bottom.
  const edge = (values) =>
    thinned(values).map((p) => [x.at(line.steps[p]),
      fits(values[p]) ? inside(y.at(values[p])) : HEIGHT - MARGIN.bottom]);
  const closed = (upper, lower) => `${pathThrough([...upper, ...lower.reverse()])}Z`;
  const paint = (shape, name) => {
    shape.style[name] = colour(line.place);
    if (name === 'stroke') shape.style.strokeDasharray = dashes(line.place);
    group.append(shape);
  };
  if (spec.stacked) {
    const bottom = line.steps.map((step, p) => [x.at(step), y.at(line.base[p])]);
    const top = line.steps.map((step, p) => [x.at(step), y.at(line.values[p])]);
    paint(draw('path', { class: 'area', d: closed(top, bottom) }), 'fill');
  } else if (line.low && line.low[0] !== null) {
    paint(draw('path', { class: 'band', d: closed(edge(line.high), edge(line.low)) }), 'fill');
  }
  if (line.raw) paint(draw('path', { class: 'raw', d: pathThrough(points(line.raw)) }), 'stroke');
  const drawn = points(line.values);
  paint(draw('path', { class: 'line', d: pathThrough(drawn) }), 'stroke');
  if (drawn.length <= MARKED_BELOW && !spec.stacked && !line.faint) {
    for (const point of drawn.filter(Boolean)) {
      paint(draw('circle', { cx: point[0], cy: point[1], r: 2.5 }), 'fill');
    }
  }
  return group;
};
