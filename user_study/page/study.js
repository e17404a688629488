// The rating page: consent, instructions, practice, rating, thanks. It talks to the study's own routes.
const root = element.querySelector(".study");
const part = (name) => root.querySelector(`[data-part="${name}"]`);
const choices = [...root.querySelectorAll("button[data-choice]")];
const base = location.pathname.replace(/\/study\/?$/, "");

let welcome = null;      // the study's words and criteria
let language = "en";
let turn = null;         // where the server says we stand
let shown = null;        // the pair on show
let answers = {};        // to the criteria asked so far of it
let ready = false;       // a choice is possible
let shownAt = 0;         // when both its pictures were decoded
let hiddenMs = 0;        // since then, in another tab
let hiddenSince = null;
let undoKey = null;      // of the vote that U takes back
let unsaid = null;       // the turn to go on with after feedback
let said = null;         // the notice on show

// --- words ---------------------------------------------------------------------------------------------------------
const text = (key, values = {}) =>
  (welcome?.strings[language][key] ?? "").replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");

function setLanguage(name) {
  language = name;
  const wording = welcome.wording[language];
  document.documentElement.lang = language;
  document.title = wording.title;
  part("title").textContent = wording.title;
  root.querySelectorAll("[data-s]").forEach((node) => { node.textContent = text(node.dataset.s); });
  root.querySelectorAll("[data-alt]").forEach((node) => { node.alt = text(node.dataset.alt); });
  root.querySelectorAll("[data-label]").forEach((node) => node.setAttribute("aria-label", text(node.dataset.label)));
  for (const name of ["consent", "instructions"]) {
    part(name).replaceChildren(...wording[name].map((words) => Object.assign(document.createElement("p"), { textContent: words })));
  }
  part("languages").setAttribute("aria-label", text("language"));
  part("languages").querySelectorAll("button").forEach((button) => {
    button.setAttribute("aria-pressed", String(button.lang === language));
  });
  zoom.draw();
  notice(said);
  if (turn) progress();
  if (shown) question();
  if (turn?.phase === "finished") summary();
}

function offerLanguages() {
  const buttons = welcome.languages.map((name) => {
    const button = Object.assign(document.createElement("button"), { type: "button", lang: name });
    button.textContent = { en: "English", zh: "中文" }[name] ?? name;
    button.addEventListener("click", () => {
      try { localStorage.setItem("study-language", name); } catch { /* asked again next time */ }
      setLanguage(name);
      if (turn && turn.phase !== "consent") post("/api/language", { language: name });
    });
    return button;
  });
  part("languages").replaceChildren(...(buttons.length > 1 ? buttons : []));
}

function firstLanguage() {
  let kept = null;
  try { kept = localStorage.getItem("study-language"); } catch { /* no storage */ }
  const wanted = [welcome.language, kept, ...navigator.languages.map((name) => name.slice(0, 2))];
  return wanted.find((name) => welcome.languages.includes(name)) ?? welcome.languages[0];
}

function notice(key) {
  said = key;
  part("notice").textContent = key ? text(key) || "No connection." : "";
}

// --- phases --------------------------------------------------------------------------------------------------------
function phase(name) {
  const changed = root.dataset.phase !== name;
  root.dataset.phase = name;
  if (!["practice", "rating"].includes(name)) {
    root.setAttribute("aria-busy", "false");
    ready = false;
    if (changed) root.querySelector(`[data-for~="${name}"] h1`)?.focus({ preventScroll: true });
    if (changed) scrollTo(0, 0);
  }
}

function refuse(key) {
  part("refused-title").textContent = welcome.wording[language].title;
  part("refusal").dataset.s = key;
  part("refusal").textContent = text(key);
  phase("refused");
}

async function start() {
  [, welcome] = await ask("/api/welcome");
  outbox.key = `study-outbox-${welcome.study}`;
  offerLanguages();
  setLanguage(firstLanguage());
  if (!welcome.known) {
    const [status, body] = await post("/api/join", {});
    if (status !== 200) return refuse(body?.error === "invitation-needed" ? "invitation_needed" : "no_cookie");
  }
  await flush();
}

// Send what waits, then go on where the server says.
async function flush() {
  const answer = await outbox.send();
  if (answer) return apply(answer.turn);
  const [status, next] = await ask("/api/next");
  if (status !== 200) return refuse("no_cookie");
  apply(next);
}

function apply(next) {
  turn = next;
  if (!outbox.read().length) undoKey = turn.undo;
  if (turn.phase === "paused") setTimeout(flush, 5000);
  if (turn.phase === "finished") summary();
  if (!["practice", "rating"].includes(turn.phase)) { shown = null; return phase(turn.phase); }
  const items = turn.items.filter((item) => !outbox.holds(item.assignment_id));
  phase(turn.phase);
  progress();
  if (!items.length) return;
  items.slice(1).forEach(preload);
  if (items[0].assignment_id !== shown?.assignment_id) show(items[0]);
}

function progress() {
  const practice = turn.phase === "practice";
  const waiting = outbox.read().filter(({ path }) => path === "/api/vote").length;
  const [done, total] = practice ? [turn.practice_done, turn.practice_total] : [turn.done + waiting, turn.total];
  part("bar").max = Math.max(total, 1);
  part("bar").value = done;
  part("count").textContent = text(practice ? "practice_count" : "count", { done, total });
  const minutes = Math.round((turn.seconds_left ?? 0) / 60);
  const known = !practice && turn.seconds_left !== null && turn.seconds_left > 0;
  part("time-left").textContent = known ? text(minutes ? "minutes_left" : "under_a_minute", { minutes }) : "";
  allowUndo();
}

function summary() {
  part("summary").textContent = text(turn.done ? "thanks" : "nothing_left", { done: turn.done });
  allowUndo();
}

function allowUndo() {
  const possible = Object.keys(answers).length > 0 || (undoKey !== null && turn.phase !== "practice");
  root.querySelectorAll("[data-do=undo]").forEach((button) => { button.disabled = !possible; });
}

// --- one pair ------------------------------------------------------------------------------------------------------
const source = (id) => `${base}/img/${id}`;

function preload(item) {
  for (const id of [item.left, item.right]) {
    const image = new Image();
    image.src = source(id);
    image.decode().catch(() => { /* tried again when it is shown */ });
  }
}

async function show(item) {
  shown = item;
  answers = {};
  ready = false;
  root.setAttribute("aria-busy", "true");
  choices.forEach((button) => { button.disabled = true; });
  part("feedback").hidden = true;
  zoom.reset();
  part("prompt").textContent = item.prompt;
  question();
  await Promise.all(["left", "right"].map((side) => load(part(side), source(item[side]), item)));
  if (shown !== item) return;
  requestAnimationFrame(() => {
    if (shown !== item) return;
    root.setAttribute("aria-busy", "false");
    shownAt = performance.now();
    hiddenMs = 0;
    hiddenSince = document.hidden ? shownAt : null;
    const number = (turn.phase === "practice" ? turn.practice_done : Number(part("bar").value)) + 1;
    part("announcement").textContent = text("announcement", { number, total: part("bar").max, prompt: item.prompt });
    open();
  });
}

async function load(image, address, item) {
  for (let wait = 500; shown === item; wait = Math.min(wait * 2, 15000)) {
    image.src = address;
    try { await image.decode(); break; } catch { image.removeAttribute("src"); await pause(wait); }
  }
  image.classList.toggle("small", image.naturalWidth <= 128);
}

function question() {
  const asked = welcome.criteria.filter((criterion) => criterion in answers).length;
  const criterion = welcome.criteria[Math.min(asked, welcome.criteria.length - 1)];
  const total = welcome.criteria.length;
  part("question").textContent = welcome.wording[language].questions[criterion];
  part("criterion").textContent = total > 1 ? text("criterion", { number: Math.min(asked + 1, total), total }) : "";
}

function open() {
  ready = true;
  choices.forEach((button) => { button.disabled = false; button.classList.remove("chosen"); });
  allowUndo();
}

function choose(choice, input) {
  if (!ready) return;
  const asked = welcome.criteria.find((criterion) => !(criterion in answers));
  answers[asked] = choice;
  choices.forEach((button) => button.classList.toggle("chosen", button.dataset.choice === choice));
  if (Object.keys(answers).length < welcome.criteria.length) {
    ready = false;  // a moment in which the choice is seen, and a second press of the same key is no answer
    setTimeout(() => { question(); open(); part("announcement").textContent = part("question").textContent; }, 180);
    return;
  }
  vote(input);
}

async function vote(input) {
  ready = false;
  choices.forEach((button) => { button.disabled = true; });
  const now = performance.now();
  if (hiddenSince !== null) { hiddenMs += now - hiddenSince; hiddenSince = now; }
  const day = 24 * 3600 * 1000;
  const item = shown;
  const key = newKey();
  outbox.add("/api/vote", {
    key, assignment_id: item.assignment_id, choices: answers, input, language,
    response_ms: Math.min(Math.round(now - shownAt), day), hidden_ms: Math.min(Math.round(hiddenMs), day),
    viewport: `${innerWidth}x${innerHeight}`, pixel_ratio: devicePixelRatio,
  });
  answers = {};
  if (item.practice) return feedback();
  undoKey = key;
  const next = turn.items.find(({ assignment_id: id }) => !outbox.holds(id));
  progress();
  if (next) show(next); else root.setAttribute("aria-busy", "true");
  await flush();
}

async function feedback() {
  const answer = await outbox.send();
  if (!answer?.feedback) return flush();
  const { better, correct } = answer.feedback;
  const words = text(correct ? "practice_right" : "practice_wrong", { better: better === "left" ? "A" : "B" });
  unsaid = answer.turn;
  const over = unsaid.phase === "practice" ? "" : text("practice_over");
  part("feedback").hidden = false;
  part("feedback-text").textContent = `${words} ${over}`.trim();
  root.querySelector("[data-do=continue]").focus();
}

function undo() {
  if (root.querySelector(".rating [data-do=undo]").disabled) return;
  const given = welcome.criteria.filter((criterion) => criterion in answers);
  if (given.length && shown) {
    delete answers[given.at(-1)];
    question();
    return open();
  }
  if (undoKey === null) return;
  outbox.add("/api/undo", { key: undoKey });
  undoKey = null;
  ready = false;
  shown = null;
  root.setAttribute("aria-busy", "true");
  choices.forEach((button) => { button.disabled = true; });
  allowUndo();
  flush();
}

// --- what people do ------------------------------------------------------------------------------------------------
const deeds = {
  consent: async () => { const [status, next] = await post("/api/consent", { language }); if (status === 200) apply(next); else start(); },
  begin: async () => { const [status, next] = await post("/api/begin", {}); if (status === 200) apply(next); else start(); },
  continue: () => { part("feedback").hidden = true; apply(unsaid); },
  undo,
  zoom: () => zoom.toggle(),
};
root.querySelectorAll("[data-do]").forEach((button) => button.addEventListener("click", (event) => {
  if (event.detail > 0) button.blur();  // after a mouse click the space bar shall mean "tie" again
  deeds[button.dataset.do]();
}));

let pointer = "pointer";
addEventListener("pointerdown", (event) => { pointer = event.pointerType === "touch" ? "touch" : "pointer"; }, true);
choices.forEach((button) => button.addEventListener("click", (event) => {
  if (event.detail > 0) button.blur();
  choose(button.dataset.choice, event.detail > 0 ? pointer : "key");
}));

const keys = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", " ": "tie", b: "both-bad" };
document.addEventListener("keydown", (event) => {
  const busy = event.repeat || event.isComposing || event.ctrlKey || event.altKey || event.metaKey;
  const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
  if (busy || typing || !["practice", "rating", "finished"].includes(root.dataset.phase)) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if ((key === " " || key === "Enter") && event.target.closest?.("button")) return;  // it presses the focused button
  if (key === "u") return undo();
  if (root.dataset.phase === "finished") return;
  if (key === "z") return zoom.toggle();
  if (!(key in keys) || event.shiftKey) return;
  event.preventDefault();
  choose(keys[key], "key");
});

document.addEventListener("visibilitychange", () => {
  if (document.hidden) hiddenSince = performance.now();
  else if (hiddenSince !== null) { hiddenMs += performance.now() - hiddenSince; hiddenSince = null; }
});

zoom.attach([...root.querySelectorAll(".frame")]);
start();
