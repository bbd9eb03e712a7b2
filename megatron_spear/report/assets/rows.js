// The list of trajectories as columns: filters and orders give numbers of rows, never copies.

/** Columns with ways to look into them. */
const rowsOf = (columns) => {
  const names = Object.keys(columns);
  return {
    columns,
    count: names.length ? columns[names[0]].length : 0,
    get: (place) => Object.fromEntries(names.map((name) => [name, columns[name][place]])),
  };
};

const keyOf = (run, group, member) => `${run}|${group}|${member}`;

/** The listing with its cross references: who was replayed, and where its own record is. */
const connect = (listing) => {
  const rows = rowsOf(listing.trajectories);
  const replays = rowsOf(listing.replayed);
  const placeOf = new Map();
  const replaysOf = new Map();
  for (let place = 0; place < rows.count; place += 1) {
    const c = rows.columns;
    placeOf.set(keyOf(c.run[place], c.group[place], c.member[place]), place);
  }
  for (let place = 0; place < replays.count; place += 1) {
    const c = replays.columns;
    const key = keyOf(c.run[place], c.group[place], c.member[place]);
    if (!replaysOf.has(key)) replaysOf.set(key, []);
    replaysOf.get(key).push(place);
  }
  const numChunks = rows.count ? (extent(rows.columns.chunk)?.[1] ?? -1) + 1 : 0;
  const replaysAt = (place) => {
    const c = rows.columns;
    return replaysOf.get(keyOf(c.run[place], c.group[place], c.member[place])) || [];
  };
  return { rows, replays, placeOf, replaysAt, numChunks, notes: listing.notes, steps: listing.steps };
};

const within = (value, low, high) => {
  if (low === '' && high === '') return true;
  if (value === null) return false;
  return (low === '' || value >= Number(low)) && (high === '' || value <= Number(high));
};

/** Whether a row's own words hold the text; turns are searched apart. */
const mentions = (columns, place, text) =>
  [columns.group, columns.prompt, columns.kind, columns.env, columns.status, columns.error]
    .some((column) => column[place].toLowerCase().includes(text)) ||
  columns.marks[place].some((mark) => mark.includes(text));

/** The numbers of the rows that pass the filters of a state, in its order.
 *
 * `hits` is the set of "chunk:line" found by a search in the turns, or null.
 */
const selectRows = (linked, filters, hits) => {
  const c = linked.rows.columns;
  const f = { from: '', to: '', low: '', high: '', ...filters };
  const text = (f.text || '').toLowerCase();
  const chosen = [];
  for (let place = 0; place < linked.rows.count; place += 1) {
    if (f.run && String(c.run[place]) !== f.run) continue;
    if (f.kind && c.kind[place] !== f.kind) continue;
    if (f.status && c.status[place] !== f.status) continue;
    if (f.won && String(c.won[place]) !== f.won) continue;
    if (!within(c.step[place], f.from, f.to) || !within(c.total[place], f.low, f.high)) continue;
    if (f.mark && !(f.mark === 'any' ? c.marks[place].length : c.marks[place].includes(f.mark))) continue;
    if (f.replayed && (linked.replaysAt(place).length > 0) !== (f.replayed === 'yes')) continue;
    if (text) {
      const inTurns = hits && hits.has(`${c.chunk[place]}:${c.line[place]}`);
      if (!inTurns && !mentions(c, place, text)) continue;
    }
    chosen.push(place);
  }
  return ordered(c, chosen, f.sort || 'step', f.order || 'down');
};

const ordered = (columns, places, name, order) => {
  const column = columns[name] || columns.step;
  const sign = order === 'up' ? 1 : -1;
  const value = (place) => {
    const found = column[place];
    if (found === null) return sign * Infinity;
    return typeof found === 'boolean' ? Number(found) : found;
  };
  return places.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === y) return a - b;
    return (x < y ? -1 : 1) * sign;
  });
};

/** The values of a column, each once, sorted. */
const distinct = (column) => [...new Set(column.flat())].filter((value) => value !== '').sort();
