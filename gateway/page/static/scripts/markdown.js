// Markdown as nodes, each made for itself and filled with text: no answer becomes markup, and nothing is fetched for it.

const DEEPEST = 8; // what is nested more deeply is text
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})\s*(\S*)/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const QUOTE = /^ {0,3}> ?/;

const isBlank = (line) => !line.trim();
const interrupts = (line) => [FENCE, HEADING, RULE, ITEM].some((kind) => kind.test(line));
const isOrdered = (marker) => marker.length > 1;
const cells = (row) => row.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
const startsTable = (line, next) => line.includes("|") && next?.includes("-") && cells(next).every((cell) => /^:?-+:?$/.test(cell));
const side = (divider) => (divider.endsWith(":") ? (divider.startsWith(":") ? "middle" : "end") : "start");

// The blocks of some lines, as objects of their kind.
function* blocks(lines) {
  const levels = []; // of the headings that a block stands under: those of an answer may leave some out
  for (let at = 0; at < lines.length; ) {
    const from = at;
    const line = lines[at];
    const until = (goesOn) => {
      while (at < lines.length && goesOn(lines[at])) at += 1;
      return lines.slice(from, at);
    };
    at += 1;
    let match;
    if (isBlank(line)) continue;
    if ((match = line.match(FENCE))) {
      const [, fence, language] = match;
      const indent = line.search(/\S/);
      const isEnd = (one) => one.trim().startsWith(fence) && !one.trim().replaceAll(fence[0], "");
      const inside = until((one) => !isEnd(one)).slice(1);
      at += 1; // its end
      yield { kind: "code", language, text: inside.map((one) => (isBlank(one.slice(0, indent)) ? one.slice(indent) : one)).join("\n") };
    } else if ((match = line.match(HEADING))) {
      const level = match[1].length;
      while (levels.at(-1) >= level) levels.pop();
      levels.push(level);
      yield { kind: "heading", level: levels.length, text: line.slice(match[0].length).trim().replace(/\s#+$/, "") };
    } else if (RULE.test(line)) {
      yield { kind: "rule" };
    } else if (QUOTE.test(line)) {
      yield { kind: "quote", lines: until((one) => !isBlank(one) && !interrupts(one)).map((one) => one.replace(QUOTE, "")) };
    } else if ((match = line.match(ITEM))) {
      yield list(until(inList(match[1].length, isOrdered(match[2]))));
    } else if (startsTable(line, lines[at])) {
      const [head, dividers, ...rows] = until((one) => one.includes("|")).map(cells);
      yield { kind: "table", head, sides: dividers.map(side), rows };
    } else {
      const isText = (one) => !isBlank(one) && !interrupts(one) && !QUOTE.test(one) && !startsTable(one, lines[at + 1]);
      yield { kind: "text", text: until(isText).join("\n") };
    }
  }
}

// Which lines belong to a list after its first: what is indented, its next items, and a paragraph that goes on.
function inList(indent, ordered) {
  let blank = false;
  return (line) => {
    const wasBlank = blank;
    blank = isBlank(line);
    if (blank || line.search(/\S/) > indent) return true;
    const item = line.match(ITEM);
    if (item) return item[1].length === indent && isOrdered(item[2]) === ordered;
    return !wasBlank && !interrupts(line) && !QUOTE.test(line);
  };
}

function list(lines) {
  const [, { length: indent }, marker] = lines[0].match(ITEM);
  const items = [];
  let width = 0;
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent) {
      width = item[0].length;
      items.push([line.slice(width).replace(/^\[ \] /, "☐ ").replace(/^\[[xX]\] /, "☑ ")]);
    } else {
      items.at(-1).push(isBlank(line.slice(0, width)) ? line.slice(width) : line.trimStart());
    }
  }
  return { kind: "list", ordered: isOrdered(marker), start: parseInt(marker, 10), items };
}

function block(found, depth) {
  const inside = (lines) => (depth < DEEPEST ? [...blocks(lines)].map((one) => block(one, depth + 1)) : [lines.join("\n")]);
  switch (found.kind) {
    case "code":
      return codeBlock(found);
    case "heading":
      return make(`h${Math.min(6, found.level + 2)}`, "", ...inline(found.text));
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", "", ...inside(found.lines));
    case "table":
      return table(found);
    case "list": {
      const made = make(found.ordered ? "ol" : "ul", "", ...found.items.map((item) => make("li", "", ...inside(item))));
      if (found.ordered) made.start = found.start;
      return made;
    }
    default:
      return make("p", "", ...inline(found.text));
  }
}

function codeBlock({ language, text }) {
  const pre = make("pre", "code", make("code", "", text));
  pre.tabIndex = 0; // so that keys scroll it
  const head = make("div", "row between", make("span", "note", language || "text"), button("Copy", () => copy(text, pre, "Code")));
  return make("div", "code-block", head, pre);
}

function table({ head, sides, rows }) {
  const row = (tag, texts) => make("tr", "", ...head.map((_, at) => make(tag, sides[at], ...inline(texts[at] ?? ""))));
  const body = make("tbody", "", ...rows.map((one) => row("td", one)));
  const made = make("div", "scrolls", make("table", "", make("thead", "", row("th", head)), body));
  made.tabIndex = 0;
  return made;
}

const isSpace = (character) => character === undefined || /\s/.test(character);
const isWord = (character) => character !== undefined && /[\p{L}\p{N}_]/u.test(character);

// The nodes of a paragraph. What would end a span is looked for no more once there is none, and an address has its
// length: a text of marks that nothing ends takes no longer than any other.
function inline(text, depth = 0, linked = false) {
  const nodes = [];
  const without = new Set();
  let plain = "";
  let opening = -1; // where the text of the next link begins and ends
  let closing = -1;
  let at = 0;

  function add(node, end) {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
    at = end;
  }

  function code() {
    const [ticks] = sticky(/`+/y, text, at);
    const from = at + ticks.length;
    const end = without.has(ticks) ? -1 : endOfCode(text, ticks, from);
    if (end < 0) {
      without.add(ticks);
      plain += ticks;
      at = from;
      return;
    }
    const inside = text.slice(from, end);
    const padded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
    add(make("code", "", padded ? inside.slice(1, -1) : inside), end + ticks.length);
  }

  function span(mark, tag) {
    const from = at + mark.length;
    const [one] = mark;
    const word = one === "_";
    if (!text.startsWith(mark, at) || without.has(mark) || depth >= DEEPEST || isSpace(text[from])) return false;
    if (word && isWord(text[at - 1])) return false;
    const ends = (end) => {
      if (isSpace(text[end - 1]) || text[end - 1] === "\\" || (word && isWord(text[end + mark.length]))) return false;
      return mark.length > 1 || (text[end - 1] !== one && text[end + 1] !== one);
    };
    let end = from;
    do end = text.indexOf(mark, end + 1);
    while (end > 0 && !ends(end));
    if (end < 0) {
      without.add(mark);
      return false;
    }
    if (mark.length > 1 && text[end + 2] === one) end += 1; // the end of another span inside
    add(make(tag, "", ...inline(text.slice(from, end), depth + 1, linked)), end + mark.length);
    return true;
  }

  // Images are links, too: to fetch one would tell its host who reads this.
  function reference(from) {
    if (closing < from && !without.has("](")) {
      closing = text.indexOf("](", from);
      opening = text.lastIndexOf("[", closing);
      if (closing < 0) without.add("](");
    }
    if (opening !== from || closing < from || linked || depth >= DEEPEST) return false;
    const match = sticky(/\]\(<?([^\s()<>]{1,2000}(?:\([^\s()]{0,200}\)[^\s()<>]{0,200})?)>?(?:\s"[^"]{0,200}")?\)/y, text, closing);
    const label = text.slice(from + 1, closing);
    const made = match && link(match[1], ...(label ? inline(label, depth + 1, true) : [match[1]]));
    if (made) add(made, closing + match[0].length);
    return made;
  }

  function address() {
    const match = linked || isWord(text[at - 1]) ? null : sticky(/<?(https?:\/\/[^\s<>"'`*|]{1,2000})>?/y, text, at);
    const bare = match?.[1].replace(/[.,:;!?\]}]+$/, "").replace(/\)$/, (end) => (match[1].includes("(") ? end : ""));
    const made = match && link(bare, bare);
    if (made) add(made, at + (text[at] === "<" ? match[0].length : bare.length));
    return made;
  }

  while (at < text.length) {
    const one = text[at];
    if (one === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (one === "`") {
      code();
      continue;
    }
    if ((one === "*" || one === "_") && (span(one + one, "strong") || span(one, "em"))) continue;
    if (one === "~" && span("~~", "s")) continue;
    if (one === "[" && reference(at)) continue;
    if (one === "!" && text[at + 1] === "[" && reference(at + 1)) continue;
    if ((one === "h" || one === "<") && address()) continue;
    const line = one === "<" && sticky(/<br ?\/?>/y, text, at);
    if (line) {
      add(make("br"), at + line[0].length);
      continue;
    }
    plain += one;
    at += 1;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function sticky(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function endOfCode(text, ticks, from) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let run; (run = runs.exec(text)); ) if (run[0] === ticks) return run.index;
  return -1;
}

// Show a text in a node. Of one that grows, blocks that stay as they are keep their nodes, and what is selected there.
function showMarkdown(node, text) {
  const found = [...blocks(text.replaceAll("\r\n", "\n").split("\n"))];
  const shown = (node.shown ??= []);
  found.forEach((one, at) => {
    const source = JSON.stringify(one);
    if (shown[at] === source) return;
    if (at < shown.length) node.children[at].replaceWith(block(one, 0));
    else node.append(block(one, 0));
    shown[at] = source;
  });
  while (shown.length > found.length) {
    node.lastElementChild.remove();
    shown.pop();
  }
}
