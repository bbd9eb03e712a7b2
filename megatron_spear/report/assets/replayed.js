// The rows that replay gave back: where they came from, and what they are worth now.

/** The link to a replayed row's own record, or why there is none. */
const originOf = (linked, row) => {
  const open = keyOf(row.run, row.group, row.member);
  const words = quoted(`${row.prompt} · ${row.member}`);
  if (!linked.placeOf.has(open)) {
    return make('span', {}, words, make('small', { text: ' not recorded' }));
  }
  return make('a', { href: linkTo({ tab: 'trajectories', open }), class: 'origin' }, words);
};

const replayedRow = (data, linked, place) => {
  const row = linked.replays.get(place);
  const gap = row.old === null || row.rollout === null ? null : row.old - row.rollout;
  return [
    make('span', {}, String(row.at),
      data.runs.length > 1 ? make('small', {}, ' ', quoted(data.runs[row.run].name)) : null),
    originOf(linked, row),
    row.from === null ? '–' : String(row.from),
    `${row.age} (version ${row.version})`,
    make('span', { title: `outcome ${row.outcome}, intrinsic ${row.intrinsic}, format ${row.format}`,
      text: number(row.total) }),
    number(row.baseline),
    signed(row.stored_advantage),
    signed(row.advantage),
    number(row.weight),
    `${row.tokens} in ${row.segments.length} segment${row.segments.length === 1 ? '' : 's'}`,
    String(row.calls),
    make('span', { title: `trainer − engine ${number(gap)} nats`, text: number(row.ratio) }),
  ];
};

const REPLAY_HEADS = ['replayed in step', 'trajectory', 'played in step', 'age, versions', 'reward',
  'baseline', 'advantage then', 'advantage recalibrated', 'weight gamma', 'tokens', 'calls',
  'ratio, mean'];

/** The tab of replayed rows, newest first. */
const replayTab = (data, linked) => {
  const { replays } = linked;
  if (!replays.count) {
    return [make('p', { class: 'empty', text: 'No replayed rows are recorded.' })];
  }
  const c = replays.columns;
  const places = [];
  for (let place = replays.count - 1; place >= 0; place -= 1) {
    const isRun = !state.run || String(c.run[place]) === state.run;
    if (isRun && within(c.at[place], state.rfrom || '', state.rto || '')) places.push(place);
  }
  const page = Math.min(Number(state.page || 0), Math.max(0, Math.ceil(places.length / PAGE) - 1));
  const steps = extent(c.at);
  const rows = places.slice(page * PAGE, (page + 1) * PAGE).map((p) => replayedRow(data, linked, p));
  const runs = data.runs.map((run, place) => [String(place), run.name]);
  return [
    make('p', { class: 'note', text: 'A replayed row is an earlier trajectory that was trained on '
      + 'once more. Its advantage was recalibrated: its reward, with the intrinsic part at its '
      + 'present weight, against the present baseline. Its loss counts with the weight gamma.' }),
    make('form', { class: 'tools', on: { submit: (event) => event.preventDefault() } },
      runs.length > 1 ? chooser('Run', [['', 'any'], ...runs], state.run || '', filterBy('run')) : null,
      entry('Step from', 'number', state.rfrom || '', filterBy('rfrom'), { placeholder: steps[0] }),
      entry('Step to', 'number', state.rto || '', filterBy('rto'), { placeholder: steps[1] })),
    make('div', { class: 'row' },
      make('p', { class: 'count', id: 'count', text: `${places.length.toLocaleString('en')} of `
        + `${replays.count.toLocaleString('en')} replayed rows` }),
      pager(places.length, page)),
    table(REPLAY_HEADS, rows, 'cards list'),
    places.length > PAGE ? pager(places.length, page) : null,
  ];
};
