// Nodes of the page: found, made and filled, always as text; and numbers as people read them.
"use strict";

const byId = (id) => document.getElementById(id);
const on = (id, event, act) => byId(id).addEventListener(event, act);

function show(node, text) {
  if (node.textContent !== text) node.textContent = text; // a selection survives where nothing changes
}

function make(tag, classes = "", ...content) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  node.append(...content.filter((one) => one !== null && one !== undefined));
  return node;
}

function attributes(node, values) {
  for (const [name, value] of Object.entries(values)) node.setAttribute(name, value);
  return node;
}

function button(text, act, classes = "small") {
  const made = make("button", classes, text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

// Links lead to the web alone, and tell nobody where they were followed from; null where this is no such address.
function link(address, ...content) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") return null;
  const made = make("a", "", ...content);
  made.href = made.title = url.href;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}

const isKnown = (value) => value !== null && value !== undefined;

function number(value) {
  if (!isKnown(value)) return "–";
  return value < 10 && !Number.isInteger(value) ? value.toFixed(1) : Math.round(value).toLocaleString("en");
}

function size(bytes) {
  if (!isKnown(bytes)) return "–";
  if (bytes < 1e3) return `${bytes} B`;
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${number(bytes / 1e6)} MB`;
}

function duration(seconds) {
  if (!isKnown(seconds)) return "–";
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

function percent(part) {
  return isKnown(part) ? `${(part * 100).toFixed(part < 0.1 && part > 0 ? 1 : 0)}%` : "–";
}

async function copy(text, node, name) {
  try {
    await navigator.clipboard.writeText(text);
    show(byId("told"), `${name} copied.`);
  } catch {
    // Without TLS a browser lets only this machine's pages write there.
    getSelection().selectAllChildren(node);
    show(byId("told"), `${name} selected: copy it with Ctrl C.`);
  }
}
