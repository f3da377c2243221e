// The two tabs, each with an address of its own, and the start of it all.

const TABS = ["talk", "watch"];

function talks() {
  return !byId("talk-panel").hidden;
}

function choose(name) {
  for (const one of TABS) {
    const tab = byId(`${one}-tab`);
    tab.setAttribute("aria-selected", String(one === name));
    tab.tabIndex = one === name ? 0 : -1;
    byId(`${one}-panel`).hidden = one !== name;
  }
  watchOrNot();
}

function go(name) {
  choose(name);
  history.replaceState(null, "", `#${name}`);
}

for (const [at, name] of TABS.entries()) {
  on(`${name}-tab`, "click", () => go(name));
  on(`${name}-tab`, "keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = TABS.at(to % TABS.length);
    go(next);
    byId(`${next}-tab`).focus();
  });
}

const chosen = () => (location.hash === "#watch" ? "watch" : "talk");
addEventListener("hashchange", () => choose(chosen()));

// A narrow window has no room for what is seldom changed.
byId("settings").open = matchMedia("(min-width: 60rem)").matches;
restore();
choose(chosen());
listModels();
