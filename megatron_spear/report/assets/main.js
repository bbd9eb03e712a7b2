// Puts the parts together and answers the keyboard.

const byId = (id) => document.getElementById(id);

/** The tip beside an element; `text` has a line a fact. */
const showTip = (near, text) => {
  const tip = byId('tip');
  tip.textContent = text;
  tip.hidden = false;
  const box = near.getBoundingClientRect();
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  const left = Math.min(innerWidth - width - 8, Math.max(8, box.left + box.width / 2 - width / 2));
  const above = box.top - height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : Math.min(innerHeight - height - 8, box.bottom + 8)}px`;
};

const hideTip = () => {
  byId('tip').hidden = true;
};

const TABS = [
  ['curves', 'Curves'], ['figures', 'Figures'], ['trajectories', 'Trajectories'], ['replay', 'Replay'],
];

const tabsOf = (data) =>
  TABS.filter(([name]) => name !== 'figures' || data.arms.length).map(([name, label]) =>
    make('a', {
      role: 'tab',
      id: `tab-${name}`,
      href: linkTo({ tab: name, open: '', page: '' }),
      'aria-controls': 'view',
      'aria-selected': String((state.tab || 'curves') === name),
      text: label,
    }));

let drawing = 0;

/** Draw what the state says. */
const show = async (data, listing) => {
  drawing += 1;
  const mine = drawing;
  hideTip();
  document.documentElement.dataset.theme = state.theme || '';
  const tab = state.tab || 'curves';
  refill(byId('top'), header(data));
  refill(byId('tabs'), tabsOf(data));
  byId('view').setAttribute('aria-labelledby', `tab-${tab}`);
  let parts = [];
  if (tab === 'curves') {
    parts = [data.arms.length ? null : summaryOf(data), ...curvesTab(data)];
  } else if (tab === 'figures') {
    parts = figuresTab(data);
  } else {
    const linked = await listing;
    parts = tab === 'replay' ? replayTab(data, linked)
      : state.open ? await trajectoryTab(data, linked, state.open) : listTab(data, linked);
  }
  if (mine !== drawing) return;
  refill(byId('view'), parts.filter(Boolean));
};

const summaryOf = (data) => (data.runs[0].summary.length ? summaryTable(data.runs[0]) : null);

const failed = (error) => {
  byId('view').replaceChildren(
    make('p', { class: 'note warn', text: `This report cannot be read: ${error.message}` }),
  );
  throw error;
};

const takesKeys = (target) => target.matches('select, input:not([type=checkbox])');

const answerKey = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || takesKeys(event.target)) return;
  const clicks = { j: 'next', k: 'previous', Escape: 'back' };
  if (clicks[event.key]) byId(clicks[event.key])?.click();
  if (event.key === '/' && byId('search')) {
    event.preventDefault();
    byId('search').focus();
  }
  const tabs = [...byId('tabs').children];
  const at = tabs.indexOf(document.activeElement);
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (at >= 0 && by) tabs[(at + by + tabs.length) % tabs.length].focus();
};

const ready = () =>
  document.readyState === 'loading'
    ? new Promise((done) => document.addEventListener('DOMContentLoaded', done, { once: true }))
    : Promise.resolve();

const start = async () => {
  const data = await unpackJson('data');
  const listing = ready().then(() => unpackJson('listing')).then(connect);
  listing.catch(failed);
  render = () => show(data, listing).catch(failed);
  const move = () => {
    state = readState();
    render();
    scrollTo(0, 0);
  };
  addEventListener('popstate', move);
  document.addEventListener('keydown', answerKey);
  addEventListener('pagehide', keepPlace);
  const kept = placeBefore();
  if (kept) restoreCharts(kept);
  await show(data, listing);
  performance.mark('drawn');
  byId('foot').append(make('p', { text: 'Keys: / search, j and k next and previous trajectory, Esc '
    + 'back to the list, arrows move the cursor of a chart or along tokens.' }));
  follow(data);
  if (kept) restorePlace(kept);
};

start().catch(failed);
