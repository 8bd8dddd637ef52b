"use strict";

const AT_ONCE = 4; // requests; the server computes pictures that come together in one batch
const TRIES = 8; // of a request that the server has no room for
const byId = (id) => document.getElementById(id);
const settings = document.body.dataset;
const shown = []; // {file, address, card, answer, heat, note, isAsked, isBeingDrawn}
const waiting = []; // work: functions that return promises
let running = 0;

if (settings.token === "true") {
  byId("key").hidden = false;
  byId("token").value = sessionStorage.getItem("token") || "";
  byId("token").addEventListener("change", (event) => sessionStorage.setItem("token", event.target.value));
}
byId("heat").hidden = settings.explains !== "true";

function schedule(work) {
  waiting.push(work);
  next();
}

function next() {
  while (running < AT_ONCE && waiting.length) {
    running += 1;
    waiting.shift()().finally(() => {
      running -= 1;
      tell();
      next();
    });
  }
}

async function ask(path, file) {
  const headers = { "Content-Type": "application/octet-stream" };
  if (byId("token").value) headers.Authorization = `Bearer ${byId("token").value}`;
  for (let tried = 1; ; tried += 1) {
    let response;
    try {
      response = await fetch(path, { method: "POST", headers, body: file });
    } catch {
      throw new Error("The server cannot be reached.");
    }
    if (response.status !== 503 || tried === TRIES) return response;
    const seconds = Number(response.headers.get("Retry-After")) || 1;
    await new Promise((done) => setTimeout(done, 1000 * seconds * (0.5 + Math.random())));
  }
}

async function failure(response) {
  try {
    const body = await response.json();
    return body.detail || body.predictions[0].error;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function percent(probability) {
  return `${(100 * probability).toFixed(1)} %`;
}

class Refused extends Error {} // asking again would not help

function fail(one, error) {
  one.card.classList.add("bad");
  one.card.querySelector(".again").hidden = error instanceof Refused;
  one.card.querySelector(".verdict").textContent = error.message;
}

async function predict(one) {
  if (one.isAsked || one.answer) return;
  one.isAsked = true;
  one.card.querySelector(".verdict").textContent = "…";
  one.card.classList.remove("bad");
  one.card.querySelector(".again").hidden = true;
  try {
    if (one.file.size > settings.megabytes * 1e6) throw new Refused(`Larger than ${settings.megabytes} MB.`);
    const response = await ask("/predict", one.file);
    if (response.status === 422) throw new Refused(`Not labelled: ${await failure(response)}`);
    if (!response.ok) throw new Error(await failure(response));
    const body = await response.json();
    one.answer = body.predictions[0];
    byId("model").textContent = body.model;
    show(one);
    if (byId("explain").checked) await explain(one);
  } catch (error) {
    fail(one, error);
  } finally {
    one.isAsked = false;
  }
}

function show({ card, answer }) {
  const sure = percent(answer.probability);
  card.classList.toggle("unsure", answer.abstained);
  card.querySelector(".verdict").textContent = answer.abstained
    ? `Not sure: perhaps ${answer.label}, ${sure}`
    : `${answer.label}, ${sure}`;
  card.querySelector("ol").replaceChildren(...answer.top.map(({ label, probability }) => {
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

async function explain(one) {
  const image = one.card.querySelector("img");
  if (one.isBeingDrawn) return;
  if (!one.heat) {
    one.isBeingDrawn = true;
    one.note = "";
    try {
      const response = await ask("/explain", one.file);
      if (!response.ok) throw new Error(await failure(response));
      one.heat = URL.createObjectURL(await response.blob());
    } catch (error) {
      one.note = `No heat map: ${error.message}`;
      return;
    } finally {
      one.isBeingDrawn = false;
    }
  }
  if (!byId("explain").checked) return;
  image.hidden = false;
  one.card.querySelector(".nothing").hidden = true;
  image.src = one.heat;
  image.alt = `${one.file.name}, with what speaks for ${one.answer.label} in colour`;
}

function tell() {
  const done = shown.filter((one) => one.answer || one.card.classList.contains("bad"));
  const bad = shown.filter((one) => one.card.classList.contains("bad")).length;
  const counted = `${done.length} of ${shown.length} pictures done`;
  const notes = byId("explain").checked ? new Set(shown.map((one) => one.note).filter(Boolean)) : [];
  byId("status").textContent = [bad ? `${counted}, ${bad} not labelled` : counted, ...notes].join(". ");
}

function add(files) {
  for (const file of files) {
    const card = byId("card").content.firstElementChild.cloneNode(true);
    const one = { file, card, address: URL.createObjectURL(file) };
    const image = card.querySelector("img");
    image.alt = file.name;
    image.addEventListener("error", () => {
      image.hidden = true;
      card.querySelector(".nothing").hidden = false;
    });
    image.src = one.address;
    card.querySelector(".again").addEventListener("click", () => schedule(() => predict(one)));
    card.querySelector("figcaption").textContent = file.name;
    byId("results").append(card);
    shown.push(one);
    schedule(() => predict(one));
  }
  byId("empty").hidden = shown.length > 0;
  byId("tools").hidden = shown.length === 0;
  tell();
}

byId("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";
});
byId("clear").addEventListener("click", () => {
  waiting.length = 0;
  for (const one of shown.splice(0)) {
    URL.revokeObjectURL(one.address);
    if (one.heat) URL.revokeObjectURL(one.heat);
  }
  byId("results").replaceChildren();
  byId("files").focus();
  add([]);
});
byId("explain").addEventListener("change", (event) => {
  for (const one of shown.filter(({ answer }) => answer)) {
    if (event.target.checked) schedule(() => explain(one));
    else {
      const image = one.card.querySelector("img");
      image.src = one.address;
      image.alt = one.file.name;
    }
  }
  tell();
});
byId("token").addEventListener("change", () => {
  for (const one of shown.filter(({ answer }) => !answer)) schedule(() => predict(one));
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.remove("over");
  });
}
document.addEventListener("drop", (event) => add(event.dataTransfer.files));
