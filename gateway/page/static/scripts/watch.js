// The watch: how the gateway is, its models, keys and upstreams, and what failed last, once a second while it is seen.

const FIGURES = [
  { title: "Requests/s", names: ["requests_per_second"], format: number },
  { title: "Errors/s", names: ["errors_per_second"], format: number, classes: "bad" },
  { title: "Time to first token", names: ["first_token_p50", "first_token_p99"], labels: ["p50", "p99"], format: duration },
  { title: "Tokens/s", names: ["tokens_per_second"], format: number },
  { title: "Requests in flight", names: ["in_flight", "queue"], labels: ["total", "queued"], format: number },
  { title: "Buffer memory", names: ["buffered_bytes"], format: size },
];
// What is said of a failure that has no sentence of its own.
const OUTCOMES = {
  done: "The model server's own answer, which went to the client as it was.",
  refused: "Refused.",
  upstream_error: "The model server broke off, or answered with an error of its own.",
  drained: "The gateway shut down before the answer had ended.",
  shortage: "The client did not read its answer, and there was no memory to keep it.",
};
const STATES = ["down", "loading", "draining", "serving"];

let watching = null;

for (const figure of FIGURES) addChart(byId("figures"), figure);

// Of a minute's tokens only a part is saved up: what is left now is no share of these.
const left = (now, minute) => (isKnown(minute) ? `${number(now)} (${number(minute)}/min)` : "–");

// A table's rows, each the texts of its cells, put into those that are there.
function showRows(id, rows) {
  const body = byId(id).tBodies[0];
  while (body.rows.length > rows.length) body.lastElementChild.remove();
  rows.forEach((texts, at) => {
    const row = body.rows[at] ?? body.appendChild(make("tr", "", ...texts.map((_, cell) => make(cell ? "td" : "th"))));
    if (!at && !row.cells[0].scope) row.cells[0].scope = "row";
    texts.forEach((text, cell) => show(row.cells[cell], text));
  });
}

function showModels(served = []) {
  showRows("models", served.map(({ model, serving, upstreams, running, queue }) => [
    model ?? "other models", isKnown(upstreams) ? `${serving} of ${upstreams}` : "–", number(running), number(queue),
  ]));
}

function showKeys(keys) {
  byId("keys-card").hidden = !keys;
  showRows("keys", (keys ?? []).map((one) => [
    one.name,
    isKnown(one.max_in_flight) ? `${one.running} of ${one.max_in_flight}` : number(one.running),
    number(one.queue),
    left(one.requests_left, one.requests_a_minute),
    left(one.tokens_left, one.tokens_a_minute),
  ]));
}

// One upstream

const COUNTS = [["in_flight", "In flight"], ["running", "Running"], ["waiting", "Waiting"], ["tokens_per_second", "Tokens/s"]];
const PARTS = [["kv_cache", "KV cache"], ["prefix_hits", "Prefix hits"]];

function upstreamCard() {
  const parts = { url: make("h3", "code"), state: make("span", "badge"), source: make("span", "note"), why: make("p", "note") };
  const facts = make("dl", "facts");
  const add = (name, title, ...more) => {
    facts.append(make("div", "", make("dt", "", title), make("dd", "", (parts[name] = make("span")), ...more)));
  };
  for (const [name, title] of COUNTS) add(name, title);
  for (const [name, title] of PARTS) {
    parts[`${name}_meter`] = attributes(make("meter"), { "aria-label": title });
    add(name, title, parts[`${name}_meter`]);
  }
  const item = make("li", "card", make("div", "row between", parts.state, parts.source), parts.url, parts.why, facts);
  item.parts = parts;
  return item;
}

function showUpstreams(upstreams) {
  const list = byId("upstreams");
  while (list.children.length < upstreams.length) list.append(upstreamCard());
  while (list.children.length > upstreams.length) list.lastElementChild.remove();
  // What needs a look comes first; the others keep their order.
  const sorted = [...upstreams].sort((one, other) => STATES.indexOf(one.state) - STATES.indexOf(other.state));
  sorted.forEach((upstream, at) => {
    const { parts } = list.children[at];
    show(parts.url, upstream.url);
    show(parts.state, upstream.state);
    parts.state.className = `badge ${upstream.state}`;
    show(parts.source, upstream.source === upstream.url ? "" : (upstream.source ?? ""));
    show(parts.why, upstream.why || upstream.models.join(", "));
    for (const [name] of COUNTS) show(parts[name], number(upstream[name]));
    for (const [name] of PARTS) {
      show(parts[name], percent(upstream[name]));
      parts[`${name}_meter`].hidden = !isKnown(upstream[name]);
      parts[`${name}_meter`].value = upstream[name] ?? 0;
    }
  });
}

function sentenceOf({ message, outcome }) {
  const [, limit] = outcome.split("timeout:");
  return message ?? (limit ? `A time limit has passed: ${limit.replaceAll("_", " ")}.` : (OUTCOMES[outcome] ?? outcome));
}

function showErrors(errors) {
  const list = byId("errors");
  const newest = errors.map(({ request_id: id }) => id).join(" ");
  if (list.newest === newest) return;
  list.newest = newest;
  byId("no-errors").hidden = errors.length > 0;
  list.replaceChildren(...errors.map((one) => {
    const at = make("time", "", new Date(one.time * 1000).toLocaleTimeString());
    at.dateTime = new Date(one.time * 1000).toISOString();
    const code = [one.code, one.path, one.upstream, one.request_id].map((text) => text && make("span", "code", text));
    return make("li", "", make("div", "row", at, make("span", "status", one.status), ...code), make("p", "", sentenceOf(one)));
  }));
}

function showState(text, state) {
  const line = byId("state");
  if (line.dataset.shown === text) return; // it is read out when it changes
  line.dataset.shown = text;
  line.replaceChildren(make("span", `badge ${state}`, text));
}

function stateOf({ status, upstreams }) {
  const serving = upstreams.filter(({ state }) => state === "serving").length;
  const many = upstreams.length === 1 ? "" : `: ${serving} of ${upstreams.length} upstreams`;
  return status === "serving" ? `Serving${many}` : status === "draining" ? "Draining" : "Unavailable: no upstream is serving";
}

function sampled(told) {
  showState(stateOf(told), told.status);
  sayWhatItIs(told.version, (told.models ?? []).map(({ model }) => model).filter(Boolean));
  showCharts(told);
  showModels(told.models);
  showKeys(told.keys);
  showUpstreams(told.upstreams);
  showErrors(told.errors);
}

async function watch(signal) {
  while (!signal.aborted) {
    try {
      for await (const [, event] of events(await call("v1/status/stream", { signal }))) sampled(JSON.parse(event));
    } catch (error) {
      if (error.status === 401 || error.name === "AbortError") return;
    }
    showState("The gateway does not answer. Trying again", "down");
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

// Nobody is to be told what nobody sees.
function watchOrNot() {
  watching?.abort();
  watching = null;
  if (talks() || document.hidden) return;
  watching = new AbortController();
  watch(watching.signal);
}

document.addEventListener("visibilitychange", watchOrNot);
