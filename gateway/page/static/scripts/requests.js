// The request that is asked next, in the forms that the gateway takes, and how other programs send the same.

const base = new URL("v1", document.baseURI).href;
const url = `${base}/chat/completions`;

// What is set by hand; what is not is the gateway's to choose.
function sampling() {
  const set = (id) => (byId(id).value ? Number(byId(id).value) : undefined);
  const stop = byId("stop-sequences").value.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  return {
    max_new_tokens: set("tokens"),
    temperature: set("temperature"),
    top_p: set("top-p"),
    seed: set("seed"),
    stop: stop.length ? stop : undefined,
  };
}

// The messages that ask this after those turns.
function messagesOf(before, user) {
  const system = systemText();
  const said = before.filter(({ answer }) => answer.text).flatMap((turn) => [
    { role: "user", content: turn.user },
    { role: "assistant", content: turn.answer.text },
  ]);
  return [...(system ? [{ role: "system", content: system }] : []), ...said, { role: "user", content: user }];
}

// What this page sends. A field of undefined is none.
function asSimplified(messages) {
  const streaming = byId("streaming").checked;
  const isFirst = messages.every(({ role }) => role !== "assistant");
  const [system] = messages.length > 1 ? messages : [];
  return {
    messages: isFirst ? { system: system?.content, user: messages.at(-1).content } : messages,
    model: byId("model").value || undefined,
    ...sampling(),
    streaming,
    // Whatever this gateway's own style is; usage is told only where it is asked for.
    ...(streaming ? { stream_style: "openai", stream_options: { include_usage: true } } : {}),
    data: citable(),
  };
}

// The same in OpenAI's form, where what the simplified form leaves out has to be said.
function asOpenAI(messages) {
  const { max_new_tokens = 1024, temperature = 0.01, top_p = 0.95, seed, stop } = sampling();
  const model = byId("model").value || models[0] || "MODEL";
  return { model, messages, max_tokens: max_new_tokens, temperature, top_p, seed, stop, stream: byId("streaming").checked };
}

function asCurl(body, streaming) {
  const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl${streaming ? " -N" : ""} ${inShell(url)}`, "-H 'Content-Type: application/json'"];
  if (key) lines.push('-H "x-api-key: $KEY"');
  return [...lines, `-d ${inShell(JSON.stringify(body, null, 2))}`].join(" \\\n  ");
}

function inPython(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(inPython).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, held]) => `${JSON.stringify(name)}: ${inPython(held)}`).join(", ")}}`;
}

function asPython(body) {
  const known = Object.entries({ ...body, extra_body: citable() && { data: citable() } }).filter(([, value]) => value !== undefined);
  const fields = known.map(([name, value]) => `${name}=${inPython(value)}`).join(", ");
  return [
    "from openai import OpenAI",
    `client = OpenAI(base_url=${JSON.stringify(base)}${key ? ")  # its key: OPENAI_API_KEY" : ', api_key="none")'}`,
    `answer = client.chat.completions.create(${fields})`,
    body.stream
      ? 'for chunk in answer: print("".join(choice.delta.content or "" for choice in chunk.choices), end="", flush=True)'
      : "print(answer.choices[0].message.content)",
  ].join("\n");
}

const FORMS = [
  ["curl", "curl", (messages, streaming) => asCurl({ ...asOpenAI(messages), data: citable() }, streaming)],
  ["python", "OpenAI client", (messages) => asPython(asOpenAI(messages))],
  ["simplified", "Simplified form", (messages, streaming) => asCurl(asSimplified(messages), streaming)],
];

for (const [id, title] of FORMS) {
  const pre = attributes(make("pre", "code"), { id, tabindex: 0, role: "region", "aria-label": title });
  const copies = attributes(button("Copy", () => copy(pre.textContent, pre, title)), { "aria-label": `Copy ${title}` });
  byId("same").append(make("div", "row between", make("h3", "", title), copies), pre);
}

// Only while it is seen: documents may be long.
function describe() {
  if (!byId("same").open) return;
  const asked = byId("user").value.trim();
  const last = asked ? undefined : turns.at(-1);
  const messages = last ? messagesOf(turns.slice(0, -1), last.user) : messagesOf(turns, asked || "…");
  for (const [id, , written] of FORMS) show(byId(id), written(messages, byId("streaming").checked));
}

on("same", "toggle", describe);
on("talk-panel", "input", () => {
  describe();
  keep();
});
