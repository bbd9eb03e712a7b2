// The curves of one run, or of the arms of a comparison.

const WINDOWS = [[1, 'off'], [5, '5 steps'], [10, '10 steps'], [20, '20 steps'], [50, '50 steps']];
const SMOOTH_FROM = 60;

const smoothing = (data) => {
  const steps = Math.max(...data.runs.map((run) => run.last_step));
  return Number(state.smooth || (steps >= SMOOTH_FROM ? 5 : 1));
};

/** The charts of one run: the series of the table, then any metric that is asked for. */
const chartsOfRun = (data, window) => {
  const { metrics } = data.runs[0];
  const line = (metric, label, place) => {
    const [steps, values] = metrics[metric];
    return { label, steps, values, place };
  };
  const specs = data.charts.map((chart) => ({
    ...chart,
    key: chart.title,
    lines: chart.series.map(([metric, label], place) => {
      const plain = line(metric, label, place);
      return chart.stacked || metric.startsWith('eval/') ? plain : smoothed(plain, window);
    }),
  }));
  if (state.metric && metrics[state.metric]) {
    const lines = [smoothed(line(state.metric, state.metric, 0), window)];
    specs.push({ key: 'metric', title: state.metric, unit: '', note: '', lines });
  }
  return specs;
};

/** The charts of a comparison: one a metric, in it a mean with its band for each arm. */
const chartsOfArms = (data, window) => {
  const specs = [];
  for (const chart of data.charts) {
    for (const [metric, label] of chart.series) {
      const lines = data.arms.flatMap((arm, place) => linesOfArm(data, arm, place, metric, window));
      if (!lines.length) continue;
      const title = chart.series.length > 1 ? `${chart.title}: ${label}` : chart.title;
      specs.push({ ...chart, key: metric, title, stacked: false, lines });
    }
  }
  return specs;
};

const linesOfArm = (data, arm, place, metric, window) => {
  const band = arm.bands[metric];
  if (!band) return [];
  const w = metric.startsWith('eval/') ? 1 : window;
  const label = `${arm.name} (n = ${band.n})`;
  const mean = { label, place, steps: band.steps, values: band.mean };
  if (band.n > 1) Object.assign(mean, { low: band.low, high: band.high });
  const each = state.each === '1' && band.n > 1 ? arm.runs : [];
  const single = each
    .map((run) => data.runs[run].metrics[metric])
    .filter(Boolean)
    .map(([steps, values]) => ({ label, place, steps, values, faint: true }));
  return [...single.map((line) => smoothed(line, w)), smoothed(mean, w)];
};

/** The tab of the curves. */
const curvesTab = (data) => {
  const many = data.arms.length > 0;
  const window = smoothing(data);
  const tools = make(
    'div',
    { class: 'tools' },
    chooser('Smoothing', WINDOWS, window, (value) => change({ smooth: value })),
  );
  if (many) {
    tools.append(tick('Show each run', state.each === '1', (on) => change({ each: on ? '1' : '' })));
  } else {
    const names = Object.keys(data.runs[0].metrics).sort();
    const options = [['', 'none'], ...names.map((name) => [name, name])];
    tools.append(
      chooser('Any metric', options, state.metric || '', (metric) => change({ metric })),
    );
  }
  const specs = many ? chartsOfArms(data, window) : chartsOfRun(data, window);
  const grid = make('div', { class: 'charts' }, specs.map(chartOf));
  if (state.metric && !many) grid.prepend(grid.lastChild);
  const note = many
    ? 'Lines are means over the runs of an arm at the steps that all of them have; bands are 95 % '
      + "intervals of that mean (Student's t). An arm of one run has none."
    : '';
  const empty = specs.length ? null : make('p', { class: 'empty', text: 'No step is recorded yet.' });
  return [make('p', { class: 'note', text: note }), tools, empty, grid];
};
