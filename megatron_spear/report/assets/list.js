// The list of trajectories: filters, order, pages.

const PAGE = 50;
const SORTS = [
  ['step', 'step'], ['total', 'reward'], ['advantage', 'advantage'], ['turns', 'turns'],
  ['tokens', 'tokens'], ['calls', 'tool calls'], ['won', 'won'],
];
const FILTERS = ['run', 'from', 'to', 'kind', 'status', 'won', 'low', 'high', 'mark', 'replayed', 'text'];
const search = { text: '', hits: null, run: 0 };

/** Whether the present text was looked for in the turns too. */
const isSearched = () => Boolean(search.hits) && search.text === (state.text || '');

const chosenRows = (linked) =>
  selectRows(linked, state, isSearched() ? search.hits : null);

/** A filter's change goes back to the first page. */
const filterBy = (name) => (value) => change({ [name]: value, page: '' });

const filterFields = (data, linked) => {
  const c = linked.rows.columns;
  const any = (values) => [['', 'any'], ...values.map((value) => [value, value])];
  const steps = extent(c.step);
  const runs = data.runs.map((run, place) => [String(place), run.name]);
  const size = { min: steps[0], max: steps[1], placeholder: '' };
  return make(
    'form',
    { class: 'tools', on: { submit: (event) => event.preventDefault() } },
    data.runs.length > 1
      ? chooser('Run', [['', 'any'], ...runs], state.run || '', filterBy('run'))
      : null,
    entry('Step from', 'number', state.from || '', filterBy('from'), { ...size, placeholder: steps[0] }),
    entry('Step to', 'number', state.to || '', filterBy('to'), { ...size, placeholder: steps[1] }),
    chooser('Kind', any(distinct(c.kind)), state.kind || '', filterBy('kind')),
    chooser('Won', [['', 'any'], ['true', 'won'], ['false', 'lost']], state.won || '', filterBy('won')),
    chooser('Ended', any(distinct(c.status)), state.status || '', filterBy('status')),
    entry('Reward from', 'number', state.low || '', filterBy('low'), { step: 'any' }),
    entry('Reward to', 'number', state.high || '', filterBy('high'), { step: 'any' }),
    chooser('Replayed', [['', 'any'], ['yes', 'later'], ['no', 'never']], state.replayed || '',
      filterBy('replayed')),
    chooser('Marks', [['', 'any or none'], ['any', 'some'], ...distinct(c.marks).map((m) => [m, m])],
      state.mark || '', filterBy('mark')),
    entry('Text', 'search', state.text || '', filterBy('text'), { id: 'search', placeholder: '/' }),
    searchButton(linked),
  );
};

/** Looks for the text in all turns too: a chunk after the other, never all at once. */
const searchButton = (linked) => {
  const text = state.text || '';
  if (!text) return null;
  const done = isSearched();
  const button = make('button', {
    type: 'button',
    id: 'search-turns',
    disabled: done,
    text: done ? 'searched in turns' : 'search in turns too',
  });
  button.addEventListener('click', async () => {
    Object.assign(search, { text, hits: null, run: search.run + 1 });
    const mine = search.run;
    const stopped = () => search.run !== mine || state.text !== text;
    const progress = (chunk) => {
      button.textContent = `searching, ${Math.round((100 * chunk) / linked.numChunks)} %`;
    };
    const hits = await searchBodies(text, linked.numChunks, progress, stopped);
    if (stopped()) return;
    search.hits = hits;
    render();
  });
  return button;
};

const sortHead = ([name, label]) => {
  const active = (state.sort || 'step') === name;
  const down = (state.order || 'down') === 'down';
  const arrow = active ? (down ? ' ↓' : ' ↑') : '';
  const click = () =>
    change({ sort: name, order: active && down ? 'up' : 'down', page: '' });
  return make('button', {
    type: 'button',
    class: 'head',
    text: label + arrow,
    'data-sort': active ? (down ? 'descending' : 'ascending') : null,
    'data-focus': `sort by ${name}`,
    on: { click },
  });
};

const badge = (text, style) => make('span', { class: `badge ${style}`, text });

const marksOf = (row, numReplays) => [
  row.error ? badge('failed', 'bad') : null,
  ...row.marks.map((mark) => badge(shown(mark), 'warn')),
  row.left_out ? badge('not learned from', '') : null,
  numReplays ? badge(`replayed ×${numReplays}`, 'info') : null,
  row.chunk < 0 ? badge('turns left out', '') : null,
];

const listRow = (data, linked, place) => {
  const row = linked.rows.get(place);
  const open = keyOf(row.run, row.group, row.member);
  return [
    make('span', {}, String(row.step),
      data.runs.length > 1 ? make('small', {}, ' ', quoted(data.runs[row.run].name)) : null),
    make('a', { href: linkTo({ tab: 'trajectories', open }), class: 'open', 'data-focus': open },
      quoted(`${row.prompt} · ${row.member}`)),
    row.won ? badge('won', 'good') : badge('lost', ''),
    quoted(row.status.replaceAll('_', ' ')),
    number(row.total),
    row.advantage === null ? '–' : signed(row.advantage),
    String(row.turns),
    String(row.tokens),
    row.calls ? `${row.good_calls} of ${row.calls}` : '0',
    make('span', { class: 'marks' }, marksOf(row, linked.replaysAt(place).length)),
  ];
};

const pager = (numRows, page) => {
  const pages = Math.max(1, Math.ceil(numRows / PAGE));
  const go = (to) => change({ page: to > 0 ? String(to) : '' });
  const button = (text, to, enabled) =>
    make('button', {
      type: 'button',
      text,
      disabled: !enabled,
      'data-focus': text,
      on: { click: () => go(to) },
    });
  return make(
    'div',
    { class: 'pager' },
    button('first', 0, page > 0),
    button('previous', page - 1, page > 0),
    make('span', { class: 'where', text: `page ${page + 1} of ${pages}` }),
    button('next', page + 1, page < pages - 1),
    button('last', pages - 1, page < pages - 1),
  );
};

const notesOf = (linked) =>
  linked.notes.map((note) => make('p', { class: 'note warn', text: shown(note) }));

/** The tab of trajectories. */
const listTab = (data, linked) => {
  if (!linked.rows.count) {
    return [
      ...notesOf(linked),
      make('p', {
        class: 'empty',
        text: 'No trajectories are recorded: this run has no folder trajectories/ (it is older, or '
          + 'tracking.recorded_groups is 0), or its first step has not ended.',
      }),
    ];
  }
  const chosen = chosenRows(linked);
  const page = Math.min(Number(state.page || 0), Math.max(0, Math.ceil(chosen.length / PAGE) - 1));
  const heads = ['step', 'trajectory', 'won', 'ended', 'reward', 'advantage', 'turns', 'tokens',
    'calls that succeeded', 'marks'];
  const sorts = { step: 0, won: 2, total: 4, advantage: 5, turns: 6, tokens: 7, calls: 8 };
  const cells = heads.map((head) => make('span', { text: head }));
  SORTS.forEach(([name, label]) => { cells[sorts[name]] = sortHead([name, label]); });
  const rows = chosen.slice(page * PAGE, (page + 1) * PAGE).map((p) => listRow(data, linked, p));
  const active = FILTERS.filter((name) => state[name]);
  const clear = () => change({ ...Object.fromEntries(active.map((name) => [name, ''])), page: '' });
  const count = make('p', { class: 'count' },
    make('span', { id: 'count', text: `${chosen.length.toLocaleString('en')} of `
      + `${linked.rows.count.toLocaleString('en')} recorded trajectories` }),
    active.length
      ? make('button', { type: 'button', class: 'small', text: 'all', 'data-focus': 'all',
        on: { click: clear } })
      : null);
  return [
    ...notesOf(linked),
    filterFields(data, linked),
    make('div', { class: 'row' }, count,
      chooser('Sorted by', SORTS, state.sort || 'step', (sort) => change({ sort, page: '' })),
      pager(chosen.length, page)),
    table(cells, rows, 'cards list'),
    chosen.length > PAGE ? pager(chosen.length, page) : null,
  ];
};
