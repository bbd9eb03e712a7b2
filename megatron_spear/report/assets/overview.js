// The top of the page: what is shown, how far it is; and the figures of a comparison.

const clock = (seconds) => new Date(seconds * 1000).toISOString().replace('T', ' ').slice(0, 19);

const stateOf = (run, written) => {
  const steps = run.planned_steps ? `${run.last_step} of ${run.planned_steps}` : run.last_step;
  if (run.ended) return `ended after ${run.last_step} steps`;
  if (!run.last_time) return 'nothing recorded yet';
  const minutes = Math.round((written - run.last_time) / 60);
  const ago = minutes < 1 ? 'less than a minute' : `${minutes} min`;
  return `step ${steps}; no summary yet, last record ${ago} before this was written`;
};

/** The heading; texts of settings come from outside too. */
const header = (data) => {
  const theme = { '': 'auto', light: 'light', dark: 'dark' };
  const next = { '': 'light', light: 'dark', dark: '' };
  const [run] = data.runs;
  const one = data.runs.length === 1;
  const facts = one ? run.facts : [];
  const ended = data.runs.filter((r) => r.ended).length;
  const words = one
    ? stateOf(run, data.written)
    : `${data.runs.length} runs in ${data.arms.length} arm${data.arms.length > 1 ? 's' : ''}, `
      + `${ended} ended`;
  return [
    make(
      'div',
      { class: 'headline' },
      make('h1', {}, quoted(data.title)),
      make('button', {
        type: 'button',
        class: 'small',
        id: 'theme',
        text: `colours: ${theme[state.theme || '']}`,
        on: { click: () => change({ theme: next[state.theme || ''] }) },
      }),
    ),
    make(
      'p',
      { class: 'facts' },
      make('span', { class: 'state', text: words }),
      facts.map(([label, value]) => make('span', {}, `${label} `, quoted(value, 'strong'))),
      make('span', { text: `written ${clock(data.written)} UTC` }),
    ),
  ];
};

/** The summary of a run that has ended. */
const summaryTable = (run) =>
  make(
    'details',
    { class: 'summary' },
    make('summary', { text: 'Summary of the run' }),
    table(['figure', 'value'], run.summary.map(([name, value]) => [quoted(name), quoted(value)])),
  );

const intervalText = (figure) => {
  if (!figure) return '–';
  const value = make('b', { text: number(figure.mean) });
  const range = figure.low === null ? 'one run' : `${number(figure.low)} to ${number(figure.high)}`;
  return make('span', {}, value, make('small', { text: ` ${range} (n = ${figure.n})` }));
};

/** The tab of a comparison's last figures. */
const figuresTab = (data) => {
  const names = () => data.arms.map((arm) => quoted(arm.name));
  const rows = data.figures.map((row) => [
    make('span', {}, row.name, make('small', { text: row.taken ? ` ${row.taken}` : '' })),
    ...row.arms.map(intervalText),
  ]);
  const runs = data.runs.map((run, place) => [
    quoted(run.name),
    quoted(data.arms.find((arm) => arm.runs.includes(place)).name),
    String(run.seed ?? '–'),
    stateOf(run, data.written),
  ]);
  const paths = data.arms[0].differing.map(([path]) => path);
  const settings = paths.map((path, place) => [
    quoted(path),
    ...data.arms.map((arm) => quoted(arm.differing[place][1])),
  ]);
  return [
    make('h2', { text: 'Last figures' }),
    make('p', {
      class: 'note',
      text: "Mean over the runs of an arm with its 95 % interval (Student's t over runs). "
        + 'Runs that have not ended count with what they have.',
    }),
    make('div', { class: 'wide' }, table(['figure', ...names()], rows, 'figures')),
    make('h2', { text: 'Runs' }),
    make('div', { class: 'wide' }, table(['run', 'arm', 'seed', 'state'], runs)),
    settings.length ? make('h2', { text: 'Settings that differ' }) : null,
    settings.length ? make('div', { class: 'wide' }, table(['setting', ...names()], settings)) : null,
  ];
};
