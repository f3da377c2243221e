// Makes calls with Node's own fetch: ask.mjs URL. Its input and output are those of Ask.java.
import { createInterface } from "node:readline";

const url = `${process.argv[2]}/v1/chat/completions`;
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

for (let line; !(line = await lines.next()).done; ) {
  const at = line.value.indexOf(" ");
  const [how, body] = [line.value.slice(0, at), line.value.slice(at + 1)];
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body };
  if (how === "chunks") {
    Object.assign(options, { body: new Blob([body]).stream(), duplex: "half" });
  }
  const leaving = new AbortController();
  const answer = await fetch(url, { ...options, signal: leaving.signal });
  if (how === "leave") {
    await answer.body.getReader().read();
    console.log("begun");
    await lines.next();
    leaving.abort();
    console.log("left");
    continue;
  }
  const content = Buffer.from(await answer.arrayBuffer()).toString("base64");
  console.log(`${answer.status} HTTP_1_1 ${content}`);
}
