"use strict";

const KEPT = 300; // samples, one a second
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

let key = ""; // in memory alone

function show(node, text) {
  if (node.textContent !== text) node.textContent = text; // what is selected stays so where nothing changes
}

function make(tag, classes, text) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  if (text !== undefined) node.textContent = text;
  return node;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  return value < 10 && !Number.isInteger(value) ? value.toFixed(1) : Math.round(value).toLocaleString("en");
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${number(bytes / 1e6)} MB`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

// Calls

class Refused extends Error {}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers["x-api-key"] = key;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The gateway does not answer.");
  }
  if (answer.ok) return answer;
  const why = said(await answer.text());
  if (answer.status === 401) askForKey(why);
  const refused = new Refused(`${answer.status}: ${why}`);
  refused.status = answer.status;
  refused.requestId = answer.headers.get("x-request-id");
  throw refused;
}

function said(text) {
  try {
    const told = JSON.parse(text);
    return told.error?.message ?? told.detail ?? text;
  } catch {
    return text;
  }
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (held + value).split("\n\n");
    held = whole.pop();
    for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

// The key

function askForKey(why) {
  byId("key-form").hidden = false;
  byId("key-error").hidden = !key; // the first time it is no error
  byId("key-error").textContent = key ? why : "";
  key = "";
  byId("key").focus();
}

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  if (!key) return;
  byId("key").value = "";
  byId("key-form").hidden = true;
  await listModels();
  if (!key) return;
  describe();
  watchOrNot();
  (talks() ? byId("user") : byId("watch-tab")).focus();
});

// Talk

let running = null;

async function listModels() {
  const select = byId("model");
  try {
    const { data } = await (await call("v1/models")).json();
    select.replaceChildren(select.options[0], ...data.map(({ id }) => new Option(id, id)));
  } catch {
    // A question that is asked without a model says what is wrong.
  }
}

function request() {
  const [system, user] = [byId("system").value, byId("user").value];
  const body = { messages: system ? { system, user } : { user }, streaming: byId("streaming").checked };
  if (byId("model").value) body.model = byId("model").value;
  if (byId("tokens").value) body.max_new_tokens = Number(byId("tokens").value);
  if (byId("temperature").value) body.temperature = Number(byId("temperature").value);
  // Whatever this gateway's own style is; usage is told only where it is asked for.
  if (body.streaming) Object.assign(body, { stream_style: "openai", stream_options: { include_usage: true } });
  return body;
}

function clear() {
  byId("answer").replaceChildren();
  byId("error").hidden = true;
  byId("error").textContent = "";
  for (const fact of byId("facts").querySelectorAll("dd")) fact.textContent = "–";
}

function fail(text) {
  byId("error").hidden = false;
  byId("error").textContent = text;
}

function works(now) {
  const send = byId("send");
  const stop = byId("stop");
  const focused = document.activeElement;
  byId("answer").setAttribute("aria-busy", String(now));
  send.disabled = now;
  stop.disabled = !now;
  if (now && focused === send) stop.focus();
  if (!now && (focused === stop || focused === document.body)) send.focus();
}

class Answer {
  constructor() {
    this.began = performance.now();
    this.first = this.last = null;
    this.pieces = 0;
    this.shown = null;
    this.usage = null;
  }

  add(text, kind) {
    if (!text) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
    if (this.shown?.className !== kind) byId("answer").append((this.shown = make("span", kind)));
    this.shown.append(text);
    show(byId("first-token"), duration((this.first - this.began) / 1000));
  }

  takes({ choices, usage }) {
    if (usage) this.usage = usage;
    for (const { delta, message, finish_reason } of choices ?? []) {
      const { reasoning, content } = delta ?? message;
      this.add(reasoning, "reasoning");
      this.add(content, "text");
      if (finish_reason) show(byId("finish"), finish_reason);
    }
  }

  ends(streamed) {
    const { prompt_tokens: asked, completion_tokens: told } = this.usage ?? {};
    const tokens = told ?? (streamed ? this.pieces : null);
    show(byId("prompt-tokens"), number(asked));
    show(byId("answer-tokens"), told === undefined && tokens ? `about ${tokens}` : number(tokens));
    if (!streamed) show(byId("first-token"), "–"); // all came at once
    // The first token's time is not the others'.
    const [count, from] = streamed ? [tokens - 1, this.first] : [tokens, this.began];
    if (count > 0 && this.last > from) show(byId("speed"), number((count / (this.last - from)) * 1000));
  }
}

async function readStream(stream, answer) {
  for await (const event of events(stream)) {
    if (event === "[DONE]") return;
    const told = JSON.parse(event);
    if (told.error) throw new Refused(said(event));
    answer.takes(told);
  }
  throw new Refused("The answer broke off.");
}

byId("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  clear();
  works(true);
  const answer = new Answer();
  let streamed = false;
  try {
    const got = await call("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(request()),
      signal: running.signal,
    });
    show(byId("request-id"), got.headers.get("x-request-id") ?? "–");
    streamed = got.headers.get("content-type")?.startsWith("text/event-stream") ?? false;
    if (streamed) {
      await readStream(got, answer);
    } else {
      const whole = await got.json();
      // Some releases' replies have a text and no choices.
      answer.takes(whole.choices ? whole : { choices: [{ message: { content: whole.text } }] });
    }
  } catch (error) {
    if (error.name === "AbortError") {
      show(byId("finish"), "stopped");
    } else if (error instanceof Refused) {
      if (error.requestId) show(byId("request-id"), error.requestId);
      fail(error.message);
    } else {
      fail("The answer broke off.");
    }
  }
  running = null;
  answer.ends(streamed);
  works(false);
});

byId("stop").addEventListener("click", () => running?.abort());

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && talks()) byId("ask").requestSubmit();
});

// The same request

const url = new URL("v1/chat/completions", document.baseURI).href;

function inShell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function asCurl(body) {
  const lines = [`curl${body.streaming ? " -N" : ""} ${inShell(url)}`, "-H 'Content-Type: application/json'"];
  if (key) lines.push('-H "x-api-key: $KEY"');
  return [...lines, `-d ${inShell(JSON.stringify(body, null, 2))}`].join(" \\\n  ");
}

function inPython(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, held]) => `${JSON.stringify(name)}: ${inPython(held)}`).join(", ")}}`;
}

function asPython(body) {
  const fields = Object.entries(body).map(([name, value]) => `    ${JSON.stringify(name)}: ${inPython(value)},`);
  const headers = `{"Content-Type": "application/json"${key ? ', "x-api-key": os.environ["KEY"]' : ""}}`;
  const read = body.streaming
    ? [
        "    for line in answer:",
        '        if line.startswith(b"data: {"):',
        '            for choice in json.loads(line[6:])["choices"]:',
        '                print(choice["delta"].get("content") or "", end="", flush=True)',
        "print()",
      ]
    : ['    print(json.load(answer)["text"])'];
  return [
    `import json${key ? ", os" : ""}, urllib.request`,
    "",
    `url = ${JSON.stringify(url)}`,
    "body = {",
    ...fields,
    "}",
    `headers = ${headers}`,
    "request = urllib.request.Request(url, json.dumps(body).encode(), headers)",
    "with urllib.request.urlopen(request) as answer:",
    ...read,
  ].join("\n");
}

function describe() {
  const body = request();
  show(byId("curl"), asCurl(body));
  show(byId("python"), asPython(body));
}

byId("ask").addEventListener("input", describe);

for (const [name, shown] of [["curl", "curl"], ["python", "Python"]]) {
  byId(`copy-${name}`).addEventListener("click", async () => {
    const text = byId(name);
    try {
      await navigator.clipboard.writeText(text.textContent);
      byId("copied").textContent = `${shown} copied.`;
    } catch {
      // Without TLS a browser lets only this machine's pages write there.
      getSelection().selectAllChildren(text);
      byId("copied").textContent = `${shown} selected: copy it with Ctrl C.`;
    }
  });
}

// Watch

const FIGURES = [
  { title: "Requests a second", names: ["requests_per_second"], format: number },
  { title: "Errors a second", names: ["errors_per_second"], format: number, classes: "bad" },
  { title: "First token (last minute)", names: ["first_token_p50", "first_token_p99"], labels: ["p50", "p99"], format: duration },
  { title: "Tokens a second", names: ["tokens_per_second"], format: number },
  { title: "In flight", names: ["in_flight"], format: number },
  { title: "Queue", names: ["queue"], format: number },
  { title: "Held in memory", names: ["buffered_bytes"], format: size },
];
const OUTCOMES = {
  done: "answered with an error",
  refused: "refused",
  upstream_error: "the model server broke off",
  drained: "the gateway ended",
  shortage: "nobody read it, and there was no room for it",
};

let watching = null;
let kept = {};

for (const figure of FIGURES) {
  const item = make("li", `card ${figure.classes ?? ""}`);
  const head = make("div", "row");
  figure.most = make("small", "note");
  figure.now = make("p", "figure");
  figure.spark = document.createElementNS(SVG, "svg");
  figure.spark.setAttribute("viewBox", `0 0 ${KEPT} 40`);
  figure.spark.setAttribute("preserveAspectRatio", "none");
  figure.spark.setAttribute("role", "img");
  figure.area = path(figure.spark, "area");
  figure.lines = figure.names.map((_, at) => path(figure.spark, at ? "line second" : "line"));
  head.append(make("h2", "", figure.title), figure.most);
  item.append(head, figure.now, figure.spark);
  byId("figures").append(item);
}

function path(svg, classes) {
  const made = document.createElementNS(SVG, "path");
  made.setAttribute("class", classes);
  svg.append(made);
  return made;
}

function outlines(values, most) {
  const x = (at) => KEPT - values.length + at;
  const y = (value) => (39 - (value / most) * 37).toFixed(1);
  let [filled, drawn, begun] = ["", "", null];
  values.forEach((value, at) => {
    if (value === null) {
      begun = null;
      return;
    }
    const next = values[at + 1] ?? null;
    drawn += `${begun === null ? "M" : "L"}${x(at)} ${y(value)}`;
    if (begun === null && next === null) drawn += "h1"; // one alone is a dot
    begun ??= at;
    if (next === null) {
      const top = values.slice(begun, at + 1).map((one, past) => `L${x(begun + past)} ${y(one)}`).join("");
      filled += `M${x(begun)} 40${top}L${x(at)} 40Z`;
    }
  });
  return { drawn, filled };
}

function showFigures(now) {
  for (const { title, names, labels, format, most, now: shown, spark, area, lines } of FIGURES) {
    const known = names.flatMap((name) => kept[name]).filter((value) => value !== null);
    const peak = known.length ? Math.max(...known) : null;
    const outlined = names.map((name) => outlines(kept[name], peak || 1));
    lines.forEach((line, at) => line.setAttribute("d", outlined[at].drawn));
    area.setAttribute("d", outlined[0].filled);
    if (labels) {
      const parts = names.flatMap((name, at) => [make("small", "", `${labels[at]} `), `${format(now[name])} `]);
      shown.replaceChildren(...parts);
    } else {
      show(shown, format(now[names[0]]));
    }
    show(most, peak === null ? "" : `most ${format(peak)}`);
    spark.setAttribute("aria-label", `${title} in the last five minutes: ${peak === null ? "none" : `at most ${format(peak)}`}`);
  }
}

function showUpstreams(upstreams) {
  const list = byId("upstreams");
  while (list.children.length < upstreams.length) list.append(emptyUpstream());
  upstreams.forEach((upstream, at) => {
    const parts = list.children[at].parts;
    show(parts.url, upstream.url);
    show(parts.state, upstream.state);
    parts.state.className = `badge ${upstream.state}`;
    show(parts.why, upstream.why || upstream.models.join(", "));
    for (const name of ["in_flight", "running", "waiting", "tokens_per_second"]) show(parts[name], number(upstream[name]));
    const full = upstream.kv_cache;
    show(parts.full, full === null ? "–" : `${(full * 100).toFixed(full < 0.1 ? 1 : 0)} %`);
    parts.meter.hidden = full === null;
    parts.meter.value = full ?? 0;
  });
}

function emptyUpstream() {
  const item = make("li");
  const parts = (item.parts = { url: make("span", "code"), state: make("span", "badge"), why: make("p", "why note") });
  const head = make("div", "row");
  head.append(parts.url, parts.state);
  const facts = make("dl", "facts");
  for (const [name, title] of [
    ["in_flight", "In flight"],
    ["running", "vLLM runs"],
    ["waiting", "vLLM has waiting"],
    ["tokens_per_second", "Tokens a second"],
    ["kv_cache", "KV cache"],
  ]) {
    const fact = make("div");
    parts[name] = make("dd");
    fact.append(make("dt", "", title), parts[name]);
    facts.append(fact);
  }
  parts.full = make("span");
  parts.meter = make("meter");
  parts.meter.setAttribute("aria-label", "KV cache in use");
  parts.kv_cache.append(parts.full, parts.meter);
  item.append(head, parts.why, facts);
  return item;
}

function showErrors(errors) {
  const list = byId("errors");
  const newest = errors.map(({ request_id }) => request_id).join(" ");
  if (list.newest === newest) return;
  list.newest = newest;
  byId("no-errors").hidden = errors.length > 0;
  list.replaceChildren(
    ...errors.map(({ time, status, outcome, path: where, request_id, upstream }) => {
      const item = make("li");
      const at = make("time", "", new Date(time * 1000).toLocaleTimeString());
      at.dateTime = new Date(time * 1000).toISOString();
      const [, limit] = outcome.split("timeout:");
      const how = limit ? `time limit passed: ${limit.replaceAll("_", " ")}` : (OUTCOMES[outcome] ?? outcome);
      item.append(at, make("span", "status", status), make("span", "", how), make("span", "code", where));
      if (upstream) item.append(make("span", "code muted", upstream));
      item.append(make("span", "code", request_id));
      return item;
    }),
  );
}

function showState(text, state) {
  const line = byId("state");
  if (line.dataset.shown === text) return; // it is read out when it changes
  line.dataset.shown = text;
  line.replaceChildren(make("span", `badge ${state}`, text));
}

function stateOf({ status, upstreams }) {
  const serving = upstreams.filter(({ state }) => state === "serving").length;
  const of = upstreams.length === 1 ? "" : `: ${serving} of ${upstreams.length} upstreams`;
  return status === "serving" ? `Serving${of}` : status === "draining" ? "Draining" : "Unavailable: no upstream serves";
}

function sampled(told) {
  if (told.history) kept = told.history;
  for (const { names } of FIGURES) {
    for (const name of names) {
      kept[name] ??= [];
      if (!told.history) kept[name].push(told.now[name]);
      kept[name] = kept[name].slice(-KEPT);
    }
  }
  showState(stateOf(told), told.status);
  showFigures(told.now);
  showUpstreams(told.upstreams);
  showErrors(told.errors);
}

async function watch(signal) {
  while (!signal.aborted) {
    try {
      for await (const event of events(await call("v1/status/stream", { signal }))) sampled(JSON.parse(event));
    } catch (error) {
      if (error.status === 401 || error.name === "AbortError") return;
    }
    showState("The gateway does not answer: trying again", "down");
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

// Tabs

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
  byId(`${name}-tab`).addEventListener("click", () => go(name));
  byId(`${name}-tab`).addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = TABS.at(to % TABS.length);
    go(next);
    byId(`${next}-tab`).focus();
  });
}

addEventListener("hashchange", () => choose(location.hash === "#watch" ? "watch" : "talk"));
describe();
choose(location.hash === "#watch" ? "watch" : "talk");
listModels();
