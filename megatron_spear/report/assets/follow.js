// A run that goes on: the file is loaded anew now and then, and the page comes back as it was.

const KEPT = 'megatron-spear-report';

/** Keep what the address does not say for the page after a reload. */
const keepPlace = () => {
  const kept = {
    path: location.pathname,
    hash: location.hash,
    y: scrollY,
    focus: focusIn(document.body),
    searched: search.text !== '' && search.text === state.text,
    hidden: [...hidden].map(([chart, labels]) => [chart, [...labels]]),
    log: [...isLog],
  };
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(kept));
  } catch {
    // a browser without storage for files begins at the top
  }
};

/** What this page kept before it was loaded anew; null where it was opened. */
const placeBefore = () => {
  const [loaded] = performance.getEntriesByType('navigation');
  if (loaded.type === 'navigate') return null;
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEPT));
    return kept?.path === location.pathname ? kept : null;
  } catch {
    return null;
  }
};

/** Before the first drawing: lines that were hidden, axes that were switched. */
const restoreCharts = (kept) => {
  for (const [chart, labels] of kept.hidden) hidden.set(chart, new Set(labels));
  for (const [chart, log] of kept.log) isLog.set(chart, log);
};

/** After it: the place, the focus, a search in the turns. */
const restorePlace = (kept) => {
  if (kept.hash !== location.hash) return;
  if (kept.focus) successorOf(document.body, kept.focus)?.focus({ preventScroll: true });
  if (kept.searched) byId('search-turns')?.click();
  scrollTo(0, kept.y);
};

/** Whether a field has a text that the page has not taken yet. */
const isBeingFilledIn = (field) =>
  field.dataset.taken !== undefined && field.value !== field.dataset.taken;

/** Load the file anew now and then, unless the reader says wait. */
const follow = (data) => {
  if (!data.reload_s) return;
  const wait = tick('wait', state.wait === '1', (on) => change({ wait: on ? '1' : '' }));
  byId('foot').prepend(
    make('p', { id: 'live', text: `Loads itself anew every ${number(data.reload_s)} s. ` }, wait),
  );
  setInterval(() => {
    const busy = document.hidden || isBeingFilledIn(document.activeElement);
    if (state.wait !== '1' && !busy) location.reload();
  }, data.reload_s * 1000);
};
