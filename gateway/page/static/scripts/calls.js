// Calls to the gateway that this page came from, and the key that they carry.

let key = ""; // in memory alone

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
    return String(told.error?.message ?? told.detail ?? text);
  } catch {
    return text;
  }
}

// The events of a stream, each as the name of its field and its value.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (held + value).split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const [, name, content] = event.match(/^(data|json): ([^]*)$/) ?? [];
      if (name) yield [name, content];
    }
  }
}

function askForKey(why) {
  byId("key-form").hidden = false;
  byId("key-error").hidden = !key; // the first time it is no error
  byId("key-error").textContent = key ? why : "";
  key = "";
  byId("key").focus();
}

on("key-form", "submit", async (event) => {
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

let models = [];

async function listModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    models = data.map(({ id }) => id);
    const select = byId("model");
    const chosen = select.value || kept.settings?.model;
    select.replaceChildren(select.options[0], ...models.map((id) => new Option(id, id)));
    if (models.includes(chosen)) select.value = chosen;
    const { version } = await (await call("v1/status")).json();
    sayWhatItIs(version, models);
  } catch {
    // A question that is asked without a model says what is wrong.
  }
}

function sayWhatItIs(version, served) {
  show(byId("version"), version);
  const more = served.length > 3 ? ` and ${served.length - 3} more` : "";
  show(byId("served"), served.length ? `Serving ${served.slice(0, 3).join(", ")}${more}` : "No model is served");
}
