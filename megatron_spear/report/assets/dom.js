// Elements, and texts that cannot do anything.

const SVG = 'http://www.w3.org/2000/svg';

/** An element: `props` are attributes, `on` maps events to functions, `text` is plain text. */
const make = (tag, props = {}, ...children) => fill(document.createElement(tag), props, children);

/** The same in a drawing. */
const draw = (tag, props = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), props, children);

const fill = (element, props, children) => {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === 'on') {
      for (const [event, action] of Object.entries(value)) element.addEventListener(event, action);
    } else if (name === 'text') {
      element.textContent = value;
    } else if (name === 'value') {
      element.value = value;
    } else {
      element.setAttribute(name, value === true ? '' : value);
    }
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
};

const code = (character) => `⟦U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}⟧`;

/** Controls, separators and marks without a shape, joiners, fillers, tags; half a surrogate pair. */
const HIDDEN =
  /[\u007f-\u009f\u2028\u2029\ufff9-\ufffb\p{Default_Ignorable_Code_Point}\p{Surrogate}]/gu;
const CONTROL = /[\u0000-\u0008\u000b-\u001f]/g;

/** A model's text for the eye: what would be invisible or turn the line around is spelled out. */
const shown = (text) =>
  String(text)
    .replace(/\r\n/g, '␍\n')
    .replace(CONTROL, (character) => String.fromCharCode(0x2400 + character.charCodeAt(0)))
    .replace(HIDDEN, code);

/** A model's text as an element that keeps its direction to itself. */
const quoted = (text, style = '') => make('bdi', { class: style, text: shown(text) });

/** A number in few digits: 0.1235, 1.2e-7, 12,346; a dash for none. */
const number = (value, digits = 4) => {
  if (value === null || value === undefined) return '–';
  const size = Math.abs(value);
  if (size >= 1e7 || (size > 0 && size < 1e-4)) {
    return value.toExponential(2).replaceAll('-', '−');
  }
  const places = size >= 1000 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: digits };
  return value.toLocaleString('en', places).replace('-', '−');
};

const signed = (value) => (value > 0 ? `+${number(value)}` : number(value));

/** A choice: `options` are [value, label] pairs. */
const chooser = (label, options, chosen, change) =>
  make(
    'label',
    { class: 'field' },
    make('span', { text: label }),
    make(
      'select',
      { 'data-focus': label, on: { change: (event) => change(event.target.value) } },
      options.map(([value, text]) =>
        make('option', { value, selected: String(value) === String(chosen), text: shown(text) }),
      ),
    ),
  );

/** A field; `change` gets its text when it is left or Enter is pressed. */
const entry = (label, type, value, change, extra = {}) =>
  make(
    'label',
    { class: 'field' },
    make('span', { text: label }),
    make('input', {
      type,
      value,
      'data-taken': value,
      'data-focus': label,
      ...extra,
      on: { change: (event) => change(event.target.value) },
    }),
  );

/** A box to tick. */
const tick = (label, checked, change) =>
  make(
    'label',
    { class: 'tick' },
    make('input', {
      type: 'checkbox',
      checked,
      'data-focus': label,
      on: { change: (event) => change(event.target.checked) },
    }),
    make('span', { text: label }),
  );

const headCell = (head) =>
  make('th', { scope: 'col', 'aria-sort': head.dataset?.sort ?? null }, head);

/** A table of plain texts and elements; on a phone each row is a card.
 *
 * A head whose data-sort is ascending or descending says so of its column.
 */
const table = (heads, rows, style = '') =>
  make(
    'table',
    { class: style },
    make('thead', {}, make('tr', {}, heads.map(headCell))),
    make(
      'tbody',
      {},
      rows.map((cells) =>
        make(
          'tr',
          {},
          cells.map((cell, place) => {
            const head = heads[place];
            const label = typeof head === 'string' ? head : head.textContent;
            return make('td', { 'data-label': label.replace(/ [↓↑]$/, '') }, cell);
          }),
        ),
      ),
    ),
  );
