// The tokens of a turn, shaded by what they were worth or how likely they were.

const SCALE = 10000;
const SHADES = [
  ['none', 'nothing'], ['advantage', 'advantage'], ['probability', 'token probability'],
  ['gap', 'log-prob gap, trainer − engine'],
];

/** Advantage of token t of a turn; null where it was not trained on. */
const advantageAt = (turn, t) =>
  Array.isArray(turn.advantages) ? turn.advantages[t] : (turn.advantages ?? null);

const logprobAt = (values, t) => {
  const found = values ? values[t] : null;
  return found === null || found === undefined ? null : found / SCALE;
};

/** Texts of the tokens of a turn. */
const tokenTexts = (turn) => {
  if (turn.tokens) return turn.tokens;
  let at = 0;
  return turn.lengths.map((length) => turn.text.slice(at, (at += length)));
};

/** The largest advantage and gap of a body, which the strongest shade stands for. */
const largest = (body) => {
  let [advantage, gap] = [0, 0];
  for (const turn of body.turns) {
    for (let t = 0; t < turn.rollout.length; t += 1) {
      advantage = Math.max(advantage, Math.abs(advantageAt(turn, t) ?? 0));
      const [engine, trainer] = [logprobAt(turn.rollout, t), logprobAt(turn.old, t)];
      if (engine !== null && trainer !== null) gap = Math.max(gap, Math.abs(trainer - engine));
    }
  }
  return { advantage, gap };
};

const versionAt = (turn, t) => {
  let end = 0;
  for (const [version, count] of turn.versions) {
    end += count;
    if (t < end) return version;
  }
  return null;
};

/** [value -1..1 or 0..1, which of two colours] of a token under a shading; null without a value. */
const shadeOf = (turn, t, shade, most) => {
  const engine = logprobAt(turn.rollout, t);
  const trainer = logprobAt(turn.old, t);
  if (shade === 'advantage') {
    const value = advantageAt(turn, t);
    if (value === null) return null;
    return [most.advantage ? Math.abs(value) / most.advantage : 0, value >= 0 ? 'up' : 'down'];
  }
  if (shade === 'probability') return engine === null ? null : [1 - Math.exp(engine), 'rare'];
  if (shade === 'gap') {
    if (engine === null || trainer === null) return null;
    const gap = trainer - engine;
    return [most.gap ? Math.abs(gap) / most.gap : 0, gap >= 0 ? 'up' : 'down'];
  }
  return null;
};

const paintToken = (span, shaded) => {
  span.style.backgroundColor = shaded
    ? `color-mix(in srgb, var(--shade-${shaded[1]}) ${Math.round(shaded[0] * 100)}%, transparent)`
    : '';
};

/** What a token's tip says. */
const tokenWords = (turn, text, t) => {
  const engine = logprobAt(turn.rollout, t);
  const trainer = logprobAt(turn.old, t);
  const advantage = advantageAt(turn, t);
  const lines = [
    `token ${t + 1} of ${turn.rollout.length}: ${JSON.stringify(shown(text))}`,
    engine === null
      ? 'probability unknown'
      : `probability ${number(Math.exp(engine))}, log-prob ${number(engine)} (engine)`,
  ];
  if (trainer !== null) {
    lines.push(`log-prob ${number(trainer)} (trainer before the update)`);
    if (engine !== null) lines.push(`gap ${number(trainer - engine)}`);
  }
  lines.push(advantage === null ? 'not trained on' : `advantage ${signed(advantage)}`);
  lines.push(`policy version ${versionAt(turn, t) ?? 'unknown'}`);
  return lines.join('\n');
};

/** The tokens of a turn; arrow keys go through them. */
const tokensOf = (turn, shade, most) => {
  const texts = tokenTexts(turn);
  const spans = texts.map((text, t) => {
    const span = make('span', { class: 'token', 'data-t': t, text: shown(text) });
    paintToken(span, shadeOf(turn, t, shade, most));
    return span;
  });
  let at = -1;
  const point = (t) => {
    spans[at]?.classList.remove('at');
    at = t;
    if (!spans[t]) return hideTip();
    spans[t].classList.add('at');
    return showTip(spans[t], tokenWords(turn, texts[t], t));
  };
  const keys = { ArrowRight: 1, ArrowLeft: -1 };
  return make('bdi', {
    class: 'tokens',
    tabindex: 0,
    role: 'group',
    'aria-label': `${spans.length} tokens; arrow keys go through them`,
    on: {
      pointerover: (event) => event.target.dataset.t && point(Number(event.target.dataset.t)),
      pointerleave: () => point(-1),
      blur: () => point(-1),
      keydown: (event) => {
        const by = keys[event.key];
        if (!by) return;
        event.preventDefault();
        point(Math.min(spans.length - 1, Math.max(0, at + by)));
      },
    },
  }, spans);
};

/** What the shades mean. */
const shadeLegend = (shade, most) => {
  const bar = (kinds, words) =>
    make('div', { class: 'scale', id: 'scale' }, kinds.map(([kind, word]) => {
      const patch = make('i', {});
      patch.style.background = kind
        ? `linear-gradient(to right, transparent, var(--shade-${kind}))`
        : 'none';
      return [patch, make('span', { text: word })];
    }), words ? make('span', { text: words }) : null);
  if (shade === 'advantage') {
    return bar([['up', `0 to +${number(most.advantage)}`], ['down', `0 to −${number(most.advantage)}`]],
      'tokens that were not trained on have no shade');
  }
  if (shade === 'probability') return bar([['rare', 'probability 1 to 0 when it was drawn']]);
  if (shade === 'gap') {
    return bar([['up', `0 to +${number(most.gap)} nats`], ['down', `0 to −${number(most.gap)} nats`]]);
  }
  return bar([['', 'no shading']]);
};
