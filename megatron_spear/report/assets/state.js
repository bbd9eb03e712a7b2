// What is being looked at: all of it is in the address, so that Back, a copied link and a reload
// come to the same place.

const readState = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

const addressOf = (state) => {
  const kept = Object.entries(state).filter(([, value]) => value !== '' && value !== undefined);
  return `#${new URLSearchParams(kept)}`;
};

let state = readState();
let render = () => {};

/** Change the state and draw anew. */
const change = (values) => {
  state = { ...state, ...values };
  history.replaceState(null, '', addressOf(state));
  render();
};

/** The address of another state, for links. */
const linkTo = (values) => addressOf({ ...state, ...values });
