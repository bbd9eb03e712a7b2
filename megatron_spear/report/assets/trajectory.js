// One trajectory: its turns with tokens and calls, its reward, where it was replayed.

const LEFT_OUT = {
  equal_rewards: 'all members of its group have the same reward',
  small_spread: 'the rewards of other groups spread more',
  replaced: 'its group was replaced, or left out by a hook',
  all_failed: 'all members of its group failed',
  all_marked: 'no member of its group counts',
  incomplete: 'its group is incomplete',
};

const line = (label, ...value) =>
  make('div', { class: 'pair' }, make('dt', { text: label }), make('dd', {}, ...value));

const rewardPairs = (row, body) => {
  if (row.total === null) return [line('reward', 'none: it failed')];
  const parts = Object.entries(body?.parts || {}).map(([name, value]) => `${name} ${number(value)}`);
  return [
    line('reward', make('b', { text: number(row.total) }),
      ` = outcome ${number(row.outcome)} + mu × intrinsic ${number(row.intrinsic)} + format `
      + number(row.format)),
    body && body.group_mean !== null ? line('group mean', number(body.group_mean)) : null,
    row.env_reward !== null ? line("environment's own", number(row.env_reward)) : null,
    parts.length ? line('measured', quoted(parts.join(', '))) : null,
  ];
};

const factsOf = (data, linked, row, body) => {
  const step = linked.steps.find((s) => s.run === row.run && s.step === row.step);
  const learned = row.trained
    ? 'yes'
    : `no${row.left_out ? `: ${LEFT_OUT[row.left_out] || shown(row.left_out)}` : ''}`;
  return make(
    'dl',
    { class: 'pairs' },
    data.runs.length > 1 ? line('run', quoted(data.runs[row.run].name)) : null,
    line('played in', `step ${row.step}`
      + (step ? `, from policy version ${step.version}; mu ${number(step.intrinsic_weight)}, gamma `
        + number(step.replay_weight) : '')),
    line('group', quoted(row.group), `, member ${row.member}`),
    line('task', quoted(`${row.env}${row.kind ? `: ${row.kind}` : ''}`)),
    line('ended', row.won ? badge('won', 'good') : badge('lost', ''), ' ',
      quoted(row.status.replaceAll('_', ' ')), ...marksOf({ ...row, chunk: 0, left_out: '' }, 0)),
    row.error ? line('error', quoted(body?.error || row.error, 'pre')) : null,
    rewardPairs(row, body),
    row.advantage !== null ? line('advantage', signed(row.advantage), ', mean over its tokens') : null,
    line('trained on', learned),
    line('stored for replay', row.stored ? 'yes' : 'no'),
  );
};

const replaysTable = (linked, place) => {
  const places = linked.replaysAt(place);
  if (!places.length) return null;
  const rows = places.map((p) => {
    const r = linked.replays.get(p);
    return [String(r.at), String(r.age), number(r.baseline), signed(r.stored_advantage),
      signed(r.advantage), number(r.weight), number(r.total), number(r.ratio)];
  });
  const heads = ['replayed in step', 'age, versions', 'baseline', 'advantage then',
    'advantage recalibrated', 'weight gamma', 'reward', 'ratio, mean'];
  return make('section', { class: 'replays' }, make('h3', { text: 'Replayed' }),
    table(heads, rows, 'cards'));
};

const callsOf = (turn) =>
  turn.calls.map(([name, text, succeeded]) =>
    make('div', { class: 'call' }, badge(succeeded ? 'call' : 'call failed', succeeded ? 'good' : 'bad'),
      ' ', quoted(name, 'strong'), ' ', quoted(text, 'pre')));

const versionsOf = (turn) => {
  const words = turn.versions.map(([version, count]) =>
    turn.versions.length > 1 ? `${version} (${count} tokens)` : String(version));
  return `policy version ${words.join(', then ') || 'unknown'}`;
};

const turnCard = (body, turn, place, shade, most) => {
  const marks = body.segment_marks[turn.segment] || [];
  const means = [];
  const trainedOn = turn.advantages !== null;
  if (turn.rollout.length) {
    const logs = turn.rollout.filter((value) => value !== null);
    const mean = logs.reduce((sum, value) => sum + value, 0) / (logs.length || 1) / SCALE;
    means.push(`mean log-prob ${number(mean)}`);
  }
  const head = make(
    'header',
    {},
    make('h3', { text: `Turn ${place + 1}` }),
    make('span', { text: versionsOf(turn) }),
    make('span', { text: `segment ${turn.segment}` }),
    make('span', { text: `${turn.rollout.length} tokens after ${turn.new_tokens} new ones` }),
    means.map((text) => make('span', { text })),
    make('span', {}, 'ended by ', quoted(turn.finish)),
    make('span', { text: `${number(turn.time_s, 3)} s` }),
    turn.valid ? null : badge('not valid', 'warn'),
    turn.void ? badge('void', 'bad') : null,
    marks.map((mark) => badge(shown(mark), 'warn')),
    trainedOn ? null : badge('not trained on', ''),
  );
  const plain = turn.text.trim() !== turn.action.trim();
  return make(
    'article',
    { class: 'turn', id: `turn-${place}` },
    head,
    make('div', { class: 'said' }, make('h4', { text: place ? 'Environment' : 'First observation' }),
      quoted(turn.observation, 'pre')),
    make('div', { class: 'sampled' }, make('h4', { text: 'Policy' }), tokensOf(turn, shade, most)),
    plain
      ? make('div', { class: 'action' }, make('h4', { text: 'Action given' }), quoted(turn.action, 'pre'))
      : null,
    callsOf(turn),
  );
};

/** The neighbours of a trajectory in the filtered list. */
const neighbours = (linked, place) => {
  const chosen = chosenRows(linked);
  const at = chosen.indexOf(place);
  const link = (text, to, id) => {
    if (at < 0 || chosen[to] === undefined) return make('span', { class: 'off', text });
    const row = linked.rows.get(chosen[to]);
    const open = keyOf(row.run, row.group, row.member);
    return make('a', { id, href: linkTo({ open }), text });
  };
  return make('div', { class: 'pager' },
    make('a', { id: 'back', href: linkTo({ open: '' }), text: '← list' }),
    link('previous', at - 1, 'previous'),
    link('next', at + 1, 'next'),
    make('span', { class: 'where', text: at < 0 ? '' : `${at + 1} of ${chosen.length}` }));
};

const promptOf = (body) =>
  make('details', {}, make('summary', { text: 'Prompt as the engine got it' }),
    quoted(body.prompt, 'pre'));

/** The page of one trajectory. */
const trajectoryTab = async (data, linked, key) => {
  const place = linked.placeOf.get(key);
  if (place === undefined) {
    return [make('p', { class: 'empty', text: 'This trajectory is not in the report: its group was '
      + 'not recorded, or the list begins later.' }),
    make('a', { href: linkTo({ open: '' }), text: '← list' })];
  }
  const row = linked.rows.get(place);
  const body = await bodyOf(row);
  const most = body ? largest(body) : null;
  const shade = state.shade || 'advantage';
  const turns = make('div', { class: 'turns', id: 'turns' });
  const rest = body ? body.turns.map((turn, p) => turnCard(body, turn, p, shade, most)) : [];
  turns.append(...rest);
  return [
    neighbours(linked, place),
    make('h2', {}, quoted(`${row.prompt} · ${row.member}`)),
    factsOf(data, linked, row, body),
    replaysTable(linked, place),
    body ? promptOf(body) : make('p', { class: 'note warn', text: 'Its turns were left out to keep '
      + "the file below its limit; the run's folder trajectories/ has them." }),
    body
      ? make('div', { class: 'tools sticky' },
        chooser('Shading', SHADES, shade, (value) => change({ shade: value })),
        shadeLegend(shade, most))
      : null,
    turns,
  ];
};
