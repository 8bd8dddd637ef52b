"use strict";

const CONCURRENT = 4; // requests at once; the server computes images that arrive together in one batch
const TRIES = 8; // of a request while the server's queue is full
const byId = (id) => document.getElementById(id);
const settings = document.body.dataset;
const items = []; // {file, url, card, prediction, heatMap, note, isPredicting, isExplaining}
const queue = []; // functions that return promises
let running = 0;

if (settings.token === "true") {
  byId("key").hidden = false;
  byId("token").value = sessionStorage.getItem("token") || "";
}
byId("heat").hidden = settings.explains !== "true";

function schedule(work) {
  queue.push(work);
  startNext();
}

function startNext() {
  while (running < CONCURRENT && queue.length) {
    running += 1;
    queue.shift()().finally(() => {
      running -= 1;
      showStatus();
      startNext();
    });
  }
}

async function post(path, file) {
  const headers = { "Content-Type": "application/octet-stream" };
  if (byId("token").value) headers.Authorization = `Bearer ${byId("token").value}`;
  for (let tries = 1; ; tries += 1) {
    let response;
    try {
      response = await fetch(path, { method: "POST", headers, body: file });
    } catch {
      throw new Error("The server cannot be reached.");
    }
    if (response.status !== 503 || tries === TRIES) return response;
    const seconds = Number(response.headers.get("Retry-After")) || 1;
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds * (0.5 + Math.random())));
  }
}

async function reason(response) {
  try {
    const body = await response.json();
    return body.detail || body.predictions[0].error;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

const percent = (probability) => `${(100 * probability).toFixed(1)} %`;

class Refused extends Error {} // another try would not help

async function predict(item) {
  if (item.isPredicting || item.prediction) return;
  item.isPredicting = true;
  const verdict = item.card.querySelector(".verdict"), retry = item.card.querySelector(".retry");
  verdict.textContent = "…";
  retry.hidden = true;
  item.card.classList.remove("failed");
  try {
    if (item.file.size > settings.megabytes * 1e6) throw new Refused(`Larger than ${settings.megabytes} MB.`);
    const response = await post("/predict", item.file);
    if (response.status === 422) throw new Refused(`Not classified: ${await reason(response)}`);
    if (!response.ok) throw new Error(await reason(response));
    const body = await response.json();
    item.prediction = body.predictions[0];
    byId("model").textContent = body.model;
    showPrediction(item);
    if (byId("explain").checked) await explain(item);
  } catch (error) {
    item.card.classList.add("failed");
    retry.hidden = error instanceof Refused;
    verdict.textContent = error.message;
  } finally {
    item.isPredicting = false;
  }
}

function showPrediction({ card, prediction }) {
  const label = `${prediction.label}, ${percent(prediction.probability)}`;
  card.classList.toggle("unsure", prediction.abstained);
  card.querySelector(".verdict").textContent = prediction.abstained ? `Not sure: perhaps ${label}` : label;
  card.querySelector("ol").replaceChildren(...prediction.top.map(({ label, probability }) => {
    const [line, name, number, track, bar] = ["li", "span", "span", "div", "div"].map((tag) => document.createElement(tag));
    name.textContent = name.title = label;
    number.textContent = percent(probability);
    track.className = "track";
    bar.style.width = `${100 * probability}%`;
    track.append(bar);
    line.append(name, number, track);
    return line;
  }));
}

async function explain(item) {
  if (item.isExplaining) return;
  if (!item.heatMap) {
    item.isExplaining = true;
    item.note = "";
    try {
      const response = await post("/explain", item.file);
      if (!response.ok) throw new Error(await reason(response));
      item.heatMap = URL.createObjectURL(await response.blob());
    } catch (error) {
      item.note = `No heat map: ${error.message}`;
      return;
    } finally {
      item.isExplaining = false;
    }
  }
  if (byId("explain").checked) showImage(item, item.heatMap, `${item.file.name}, evidence for ${item.prediction.label}`);
}

function showImage({ card }, url, text) {
  const image = card.querySelector("img");
  image.hidden = false;
  card.querySelector(".no-preview").hidden = true;
  image.src = url;
  image.alt = text;
}

function showStatus() {
  const failed = items.filter(({ card }) => card.classList.contains("failed")).length;
  const done = failed + items.filter(({ prediction }) => prediction).length;
  const counts = `${done} of ${items.length} images done${failed ? `, ${failed} failed` : ""}`;
  const notes = byId("explain").checked ? new Set(items.map(({ note }) => note).filter(Boolean)) : [];
  byId("status").textContent = [counts, ...notes].join(". ");
}

function add(files) {
  for (const file of files) {
    const card = byId("card").content.firstElementChild.cloneNode(true);
    const item = { file, card, url: URL.createObjectURL(file) };
    card.querySelector("img").addEventListener("error", (event) => {
      event.target.hidden = true;
      card.querySelector(".no-preview").hidden = false;
    });
    card.querySelector(".retry").addEventListener("click", () => schedule(() => predict(item)));
    card.querySelector("figcaption").textContent = file.name;
    showImage(item, item.url, file.name);
    byId("results").append(card);
    items.push(item);
    schedule(() => predict(item));
  }
  byId("empty").hidden = items.length > 0;
  byId("tools").hidden = items.length === 0;
  showStatus();
}

byId("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";
});
byId("clear").addEventListener("click", () => {
  queue.length = 0;
  for (const item of items.splice(0)) {
    URL.revokeObjectURL(item.url);
    if (item.heatMap) URL.revokeObjectURL(item.heatMap);
  }
  byId("results").replaceChildren();
  byId("files").focus();
  add([]);
});
byId("explain").addEventListener("change", (event) => {
  for (const item of items.filter(({ prediction }) => prediction)) {
    if (event.target.checked) schedule(() => explain(item));
    else showImage(item, item.url, item.file.name);
  }
  showStatus();
});
byId("token").addEventListener("change", (event) => {
  sessionStorage.setItem("token", event.target.value);
  for (const item of items) schedule(() => predict(item));
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}
