// Where the keyboard's focus is, in words that parts drawn anew understand.

const FOCUSABLE = 'a[href], button:enabled, input:enabled, select:enabled, [tabindex="0"]';

const nameOf = (element) => element.id || element.dataset.focus || '';

const namesakes = (region, name) =>
  [...region.querySelectorAll('[id], [data-focus]')].filter((element) => nameOf(element) === name);

/** The control of a region that has the focus: {name, place among its namesakes}; or null. */
const focusIn = (region) => {
  const element = document.activeElement;
  if (element === region || !region.contains(element)) return null;
  const name = nameOf(element);
  return { name, place: namesakes(region, name).indexOf(element) };
};

/** What can have the focus next to an element that cannot, the nearest before it first. */
const beside = (element) => {
  const around = [...element.parentElement.children];
  const at = around.indexOf(element);
  return [...around.slice(0, at).reverse(), ...around.slice(at + 1)]
    .map((near) => (near.matches(FOCUSABLE) ? near : near.querySelector(FOCUSABLE)))
    .find(Boolean);
};

/** The control that has taken the place of one that `focusIn` named; undefined without one. */
const successorOf = (region, { name, place }) => {
  const found = name ? namesakes(region, name) : [];
  const element = found[place] ?? found[0];
  return !element || element.matches(FOCUSABLE) ? element : beside(element);
};

/** Fill a region anew. The focus goes on to the successor of its control, else to the view: never
 * back to the top of the page. */
const refill = (region, parts) => {
  const had = focusIn(region);
  region.replaceChildren(...parts);
  if (had) (successorOf(region, had) ?? byId('view')).focus({ preventScroll: true });
};
