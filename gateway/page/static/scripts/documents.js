// Documents as context, pasted or dropped: a retriever's place is taken by whoever reads this page.

const LARGEST = 1e6; // bytes of a file
const INSTRUCTION =
  "### You are a helpful, respectful and honest assistant. Answer the question from the search results, which come from " +
  "the local knowledge base. Ignore what is not relevant to the question. If you do not know the answer, say so.";

let documents = []; // each its text and where it is from

// The system text with the documents in it, as a RAG pipeline writes it.
function systemText() {
  const system = byId("system").value;
  if (!documents.length) return system;
  const results = documents.map(({ source, text }, at) => `[${at + 1}] ${source}\n${text}`).join("\n\n");
  return `${system || INSTRUCTION} ### Search results: ${results} \n\n`;
}

// The same documents for the reply to cite; undefined without any.
function citable() {
  if (!documents.length) return undefined;
  const cited = documents.map(({ source, text }, at) => ({ text, metadata: { source, citation_id: at + 1 } }));
  return { reranked_docs: cited };
}

function addDocument(source, text) {
  documents.push({ source, text });
  documentsChanged();
}

async function addFiles(files) {
  const wrong = [];
  for (const file of files) {
    const text = file.size > LARGEST ? "" : await file.text();
    if (file.size > LARGEST) wrong.push(`${file.name} has ${size(file.size)}: a document may have ${size(LARGEST)}.`);
    else if (/[\0\uFFFD]/.test(text)) wrong.push(`${file.name} is not text in UTF-8: save it as text first.`);
    else if (!text.trim()) wrong.push(`${file.name} is empty.`);
    else documents.push({ source: file.name, text });
  }
  complain("document-error", wrong.join(" "));
  if (wrong.length) byId("documents-box").open = true;
  documentsChanged();
}

function complain(id, text) {
  byId(id).hidden = !text;
  byId(id).textContent = text;
}

function documentsChanged() {
  showDocuments();
  describe();
  keep();
}

function showDocuments() {
  show(byId("document-count"), documents.length ? String(documents.length) : "");
  byId("documents").replaceChildren(
    ...documents.map(({ source, text }, at) => {
      const remove = button("Remove", () => {
        documents.splice(at, 1);
        documentsChanged();
        byId("choose").focus();
      });
      attributes(remove, { "aria-label": `Remove ${source}` });
      const length = make("span", "note", size(new Blob([text]).size));
      return make("li", "row", make("span", "source", `[${at + 1}] ${source}`), length, remove);
    }),
  );
}

on("add-document", "click", () => {
  const text = byId("document-text").value;
  complain("document-error", text.trim() ? "" : "Paste a text first.");
  if (!text.trim()) return byId("document-text").focus();
  addDocument(byId("document-source").value.trim() || `pasted text ${documents.length + 1}`, text);
  byId("document-text").value = byId("document-source").value = "";
});

on("choose", "click", () => byId("files").click());
on("files", "change", async () => {
  await addFiles(byId("files").files);
  byId("files").value = ""; // the same file may be chosen again
});

const bringsFiles = (transfer) => talks() && transfer?.types.includes("Files");

document.addEventListener("dragover", (event) => {
  if (bringsFiles(event.dataTransfer)) event.preventDefault();
  document.body.classList.toggle("dropping", bringsFiles(event.dataTransfer));
});
for (const name of ["dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    document.body.classList.remove("dropping");
    if (name === "dragleave" || !bringsFiles(event.dataTransfer)) return;
    event.preventDefault();
    addFiles([...event.dataTransfer.files]);
  });
}
document.addEventListener("paste", (event) => {
  if (!bringsFiles(event.clipboardData)) return;
  event.preventDefault();
  addFiles([...event.clipboardData.files]);
});
