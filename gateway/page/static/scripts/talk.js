// The conversation: asked, answered as it comes, stopped, retried, edited, exported, and kept in this tab.

const STORED = "vllm-gateway";
const SETTINGS = ["system", "model", "tokens", "temperature", "top-p", "seed", "stop-sequences", "streaming"];
const FACTS = [
  ["finish", "Finish reason"],
  ["first-token", "Time to first token"],
  ["speed", "Tokens/s"],
  ["prompt-tokens", "Prompt tokens"],
  ["answer-tokens", "Answer tokens"],
  ["request-id", "Request ID"],
];

let turns = []; // each what the user said, its answer, and the node of both
let running = null;
let kept = {}; // what this tab had before it was loaded again

function keep() {
  const settings = Object.fromEntries(SETTINGS.map((id) => [id, byId(id).type === "checkbox" ? byId(id).checked : byId(id).value]));
  const plain = turns.map(({ user, answer }) => ({ user, answer }));
  try {
    sessionStorage.setItem(STORED, JSON.stringify({ settings, documents, turns: plain }));
    show(byId("not-kept"), "");
  } catch {
    show(byId("not-kept"), "This is more than the browser keeps in a tab: export it before you reload.");
  }
}

function restore() {
  try {
    kept = JSON.parse(sessionStorage.getItem(STORED)) ?? {};
  } catch {
    // What another version has kept is none of this one's.
  }
  for (const [id, value] of Object.entries(kept.settings ?? {})) {
    if (byId(id).type === "checkbox") byId(id).checked = value;
    else byId(id).value = value;
  }
  documents = kept.documents ?? [];
  for (const { user, answer } of kept.turns ?? []) showAnswer(addTurn(user, answer));
  showDocuments();
}

// One turn

function addTurn(user, answer = { text: "", reasoning: "", sources: [], facts: {}, error: "" }) {
  const turn = { user, answer, node: make("article", "turn"), parts: {} };
  const { parts } = turn;
  parts.user = make("div", "said", user);
  parts.actions = make("div", "actions", button("Copy", () => copy(turn.user, parts.user, "Question")), button("Edit", () => edit(turn)));
  parts.question = make("section", "question", make("h2", "hidden", "You"), parts.user, parts.actions);
  parts.thoughts = make("div", "thoughts");
  parts.reasoning = make("details", "reasoning", make("summary", "", "Reasoning"), parts.thoughts);
  parts.text = make("div", "markdown");
  parts.error = attributes(make("p", "error"), { role: "alert" });
  parts.sources = attributes(make("ol", "sources"), { "aria-label": "Sources" });
  parts.facts = make("dl", "facts");
  parts.retry = button("Retry", () => ask(turn.user, turns.indexOf(turn)));
  parts.after = make("div", "actions", button("Copy", () => copy(turn.answer.text, parts.text, "Answer")), parts.retry);
  const body = make("div", "answer-body", make("div", "answer-text", parts.reasoning, parts.text, parts.error), parts.sources);
  parts.answer = make("section", "answer", make("h2", "hidden", "Answer"), body, parts.facts, parts.after);
  turn.node.append(parts.question, parts.answer);
  turns.push(turn);
  byId("turns").append(turn.node);
  byId("empty").hidden = true;
  byId("about-history").hidden = false;
  return turn;
}

function showAnswer({ answer, parts }) {
  const isRunning = running?.turn.answer === answer;
  parts.answer.setAttribute("aria-busy", String(isRunning));
  parts.reasoning.hidden = !answer.reasoning;
  show(parts.thoughts, answer.reasoning);
  showMarkdown(parts.text, answer.text);
  parts.error.hidden = !answer.error;
  show(parts.error, answer.error);
  parts.sources.hidden = !answer.sources.length;
  if (parts.sources.children.length !== answer.sources.length) parts.sources.replaceChildren(...answer.sources.map(source));
  parts.after.hidden = isRunning;
  const facts = FACTS.filter(([name]) => answer.facts[name]);
  while (parts.facts.children.length < facts.length) parts.facts.append(make("div", "", make("dt"), make("dd")));
  facts.forEach(([name, title], at) => {
    const [term, value] = parts.facts.children[at].children;
    show(term, title);
    show(value, answer.facts[name]);
    value.className = name;
  });
}

function source({ url: address, source: file, bucket_name: bucket, object_name: object, citation_id: number, excerpt }) {
  const name = address ?? file ?? `${bucket}/${object}`;
  const item = make("li", "", make("span", "note", `[${number}] `), (address && link(address, address)) ?? name);
  if (excerpt) item.append(make("details", "", make("summary", "", "Excerpt"), make("p", "", excerpt)));
  return item;
}

// An answer as it comes

class Answering {
  constructor(turn) {
    this.turn = turn;
    this.abort = new AbortController();
    this.began = performance.now();
    this.first = this.last = null;
    this.pieces = this.bursts = 0;
    this.usage = null;
    this.sent = documents.map(({ text }) => text.slice(0, 600));
  }

  // Drawn with the next frame: more often would be work that nobody sees.
  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      const atEnd = document.documentElement.scrollHeight - innerHeight - scrollY < 120;
      showAnswer(this.turn);
      if (atEnd) scrollTo(0, document.documentElement.scrollHeight);
    });
  }

  add(text, name) {
    if (!text) return;
    const { answer } = this.turn;
    const now = performance.now();
    this.bursts += !(now - this.last < 1); // what one read brought is one
    this.last = now;
    this.first ??= now;
    this.pieces += 1;
    answer[name] += text;
    answer.facts["first-token"] ??= duration((this.first - this.began) / 1000);
    this.draw();
  }

  takes({ choices, usage, data }) {
    if (usage) this.usage = usage;
    if (data?.reranked_docs) this.cites(data.reranked_docs);
    for (const { delta, message, finish_reason: finish } of choices ?? []) {
      const { reasoning, reasoning_content: thought, content } = delta ?? message;
      this.add(reasoning ?? thought, "reasoning");
      this.add(content, "text");
      if (finish) this.turn.answer.facts.finish = finish;
    }
  }

  cites(sources) {
    const excerptOf = ({ citation_id: at }) => this.sent[at - 1];
    this.turn.answer.sources = sources.map((one) => ({ ...one, text: undefined, excerpt: excerptOf(one) }));
  }

  async reads(stream) {
    let ended = false;
    for await (const [name, event] of events(stream)) {
      if (event === "[DONE]") ended = true;
      else if (name === "json") this.cites(JSON.parse(event).reranked_docs ?? []); // as releases of old tell it
      else {
        const told = JSON.parse(event);
        if (told.error) throw new Refused(said(event));
        this.takes(told);
      }
    }
    if (!ended) throw new Refused("The answer broke off.");
  }

  ends(streamed) {
    const { facts } = this.turn.answer;
    const { prompt_tokens: asked, completion_tokens: told } = this.usage ?? {};
    const tokens = told ?? (streamed ? this.pieces : null);
    if (isKnown(asked)) facts["prompt-tokens"] = number(asked);
    if (tokens) facts["answer-tokens"] = told === undefined ? `about ${tokens}` : number(tokens);
    if (!streamed) delete facts["first-token"]; // all came at once
    // The first token's time is not the others', unless they all came with it.
    const [count, from] = streamed && this.bursts > 2 ? [tokens - 1, this.first] : [tokens, this.began];
    if (count > 0 && this.last > from) facts.speed = number((count / (this.last - from)) * 1000);
    cancelAnimationFrame(this.frame);
    showAnswer(this.turn);
  }
}

async function ask(user, at = turns.length) {
  if (running) return;
  for (const { node } of turns.splice(at)) node.remove();
  const body = asSimplified(messagesOf(turns, user));
  const answering = (running = new Answering(addTurn(user)));
  const { answer, node } = answering.turn;
  let streamed = false;
  works(true);
  showAnswer(answering.turn);
  node.scrollIntoView({ block: "start" });
  try {
    const got = await call("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: answering.abort.signal,
    });
    answer.facts["request-id"] = got.headers.get("x-request-id");
    streamed = got.headers.get("content-type")?.startsWith("text/event-stream") ?? false;
    if (streamed) {
      await answering.reads(got);
    } else {
      const whole = await got.json();
      // Some releases' replies have a text and no choices.
      answering.takes(whole.choices ? whole : { ...whole, choices: [{ message: { content: whole.text } }] });
    }
  } catch (error) {
    if (error.name === "AbortError") answer.facts.finish = "stopped";
    else answer.error = error instanceof Refused ? error.message : "The answer broke off.";
    answer.facts["request-id"] ??= error.requestId;
  }
  running = null;
  answering.ends(streamed);
  works(false);
  keep();
  describe();
}

function works(now) {
  const [send, stop] = [byId("send"), byId("stop")];
  const focused = document.activeElement;
  send.hidden = now;
  stop.hidden = !now;
  for (const { parts } of turns) parts.retry.disabled = now;
  if (now && focused === send) stop.focus();
  if (!now && (focused === stop || focused === document.body)) byId("user").focus();
}

function edit(turn) {
  const { parts } = turn;
  if (running || parts.question.contains(document.activeElement?.form)) return;
  const text = attributes(make("textarea"), { "aria-label": "Edit the question" });
  text.value = turn.user;
  const cancel = () => {
    form.remove();
    parts.user.hidden = parts.actions.hidden = false;
    parts.actions.lastElementChild.focus();
  };
  const form = make("form", "editing", text, make("div", "row", make("button", "first small", "Ask again"), button("Cancel", cancel)));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (text.value.trim()) ask(text.value, turns.indexOf(turn));
  });
  parts.user.hidden = parts.actions.hidden = true;
  parts.question.append(form);
  text.focus();
}

// The whole of it

function clear() {
  running?.abort.abort();
  turns = [];
  byId("turns").replaceChildren();
  byId("empty").hidden = false;
  byId("about-history").hidden = true;
  keep();
  describe();
  byId("user").focus();
}

function exportAs(name, type, content) {
  const saved = make("a");
  saved.href = URL.createObjectURL(new Blob([content], { type }));
  saved.download = name;
  saved.click();
  URL.revokeObjectURL(saved.href);
}

on("clear", "click", clear);
on("export-markdown", "click", () => {
  const cited = ({ sources }) => sources.map((one) => `\n[${one.citation_id}] ${one.url ?? one.source ?? one.object_name}`).join("");
  const parts = turns.map(({ user, answer }) => `## You\n\n${user}\n\n## Answer\n\n${answer.text}\n${cited(answer)}`);
  exportAs("conversation.md", "text/markdown", parts.join("\n\n"));
});
on("export-json", "click", () => {
  const last = turns.at(-1);
  const messages = messagesOf(turns.slice(0, -1), last.user);
  if (last.answer.text) messages.push({ role: "assistant", content: last.answer.text });
  exportAs("conversation.json", "application/json", JSON.stringify({ ...asOpenAI(messages), data: citable() }, null, 2));
});

for (const example of document.querySelectorAll("#empty button")) {
  example.addEventListener("click", () => ask(example.textContent));
}
on("ask", "submit", (event) => {
  event.preventDefault();
  const asked = byId("user").value;
  if (running || !asked.trim()) return;
  byId("user").value = "";
  ask(asked);
});
on("stop", "click", () => running?.abort.abort());
on("user", "keydown", (event) => {
  // A thumb has no other key for a new line, and what is composed is not yet written.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort.abort();
});
