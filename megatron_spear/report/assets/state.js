// What is being looked at: all of it is in the address, so that Back, a copied link and a reload
// come to the same place.

const readState = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

const addressOf = (state) => {
  const kept = Object.entries(state).filter(([, value]) => value !== '' && value !== undefined);
  return `#${new URLSearchParams(kept)}`;
};

let state = readState();
let render = () => {};

/** Change the state and draw anew; `step` makes it a step that Back undoes. */
const change = (values, { step = false } = {}) => {
  state = { ...state, ...values };
  history[step ? 'pushState' : 'replaceState'](null, '', addressOf(state));
  render();
};

/** The address of another state, for links. */
const linkTo = (values) => addressOf({ ...state, ...values });

const SCROLL = 'megatron-spear-report-scroll';

/** Load the file anew, and come back to the same place. */
const reload = () => {
  try {
    sessionStorage.setItem(SCROLL, `${location.hash} ${scrollY}`);
  } catch {
    // a browser without storage for files begins at the top
  }
  location.reload();
};

/** Where the page was scrolled to before the reload; 0 for another place. */
const scrollBefore = () => {
  try {
    const [hash, y] = (sessionStorage.getItem(SCROLL) || '').split(' ');
    sessionStorage.removeItem(SCROLL);
    return hash === location.hash ? Number(y) : 0;
  } catch {
    return 0;
  }
};
