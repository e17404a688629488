// The rating page. It talks to the study's own routes; votes wait in an outbox until the server has confirmed them.
const root = element.querySelector(".study");
const part = (name) => root.querySelector(`[data-part="${name}"]`);
const buttons = [...root.querySelectorAll("button[data-choice]")];
const base = location.pathname.replace(/\/study\/?$/, "");

let outboxKey = "";
let pair = null;         // the pair on show
let shownAt = 0;         // when both its images were decoded
let ready = false;       // a vote is possible
let sending = false;
let memory = "[]";       // the outbox where the browser gives no storage

function readOutbox() {
  try { return JSON.parse(localStorage.getItem(outboxKey) ?? "[]"); } catch { return JSON.parse(memory); }
}

function writeOutbox(votes) {
  memory = JSON.stringify(votes);
  try { localStorage.setItem(outboxKey, memory); } catch { /* kept in memory */ }
}

const pause = (ms) => new Promise((resolve) => {
  const timer = setTimeout(resolve, ms);
  addEventListener("online", () => { clearTimeout(timer); resolve(); }, { once: true });
});

// Ask until there is an answer: a lost connection or a restarting server only delays. Returns [status, body].
async function ask(path, options = {}) {
  for (let wait = 500; ; wait = Math.min(wait * 2, 15000)) {
    try {
      const answer = await fetch(`${base}${path}`, { cache: "no-store", ...options });
      if (answer.status < 500) {
        part("notice").textContent = "";
        return [answer.status, answer.ok ? await answer.json() : null];
      }
    } catch { /* no connection */ }
    part("notice").textContent = "No connection. Your votes are kept and will be sent.";
    await pause(wait);
  }
}

async function start() {
  const [, welcome] = await ask("/api/join", { method: "POST" });
  part("question").textContent = welcome.question;
  part("instruction").textContent = welcome.instruction;
  outboxKey = `study-outbox-${welcome.study}`;
  const turn = await sendOutbox();
  if (turn) return show(turn);
  const [status, next] = await ask("/api/next");
  if (status === 200) return show(next);
  part("notice").textContent = "This browser refuses the study's cookie. Allow it and reload the page.";
}

// Send what waits, oldest first; returns the last turn the server gave, if any.
async function sendOutbox() {
  let turn = null;
  for (let votes = readOutbox(); votes.length; votes = readOutbox()) {
    const [status, answer] = await ask("/api/vote", {
      method: "POST", keepalive: true, headers: { "Content-Type": "application/json" }, body: JSON.stringify(votes[0]),
    });
    turn = status === 200 ? answer.next : null;  // a vote the server refuses for good can't be sent again
    writeOutbox(readOutbox().filter((vote) => vote.assignment_id !== votes[0].assignment_id));
  }
  return turn;
}

async function show(turn) {
  part("bar").max = turn.total;
  part("bar").value = turn.done;
  part("count").textContent = `${turn.done} of ${turn.total}`;
  pair = turn.pair;
  if (!pair) return finish(turn);
  root.dataset.state = "rating";
  part("prompt").textContent = pair.prompt;
  const images = ["left", "right"].map((side) => loadImage(part(side), `${base}/img/${pair[side]}`));
  await Promise.all(images);
  buttons.forEach((button) => { button.disabled = false; button.classList.remove("chosen"); });
  root.setAttribute("aria-busy", "false");
  part("announcement").textContent = `Pair ${turn.done + 1} of ${turn.total}: ${pair.prompt}`;
  requestAnimationFrame(() => { shownAt = performance.now(); ready = true; });
}

async function loadImage(image, source) {
  for (let wait = 500; ; wait = Math.min(wait * 2, 15000)) {
    image.src = source;
    try { await image.decode(); break; } catch { image.removeAttribute("src"); await pause(wait); }
  }
  image.classList.toggle("small", image.naturalWidth <= 128);
}

function finish(turn) {
  root.dataset.state = "finished";
  root.setAttribute("aria-busy", "false");
  part("summary").textContent = `You judged all ${turn.total} pairs.`;
  root.querySelector(".thanks").focus();
}

async function vote(choice) {
  if (!ready || sending) return;
  ready = false;
  sending = true;
  const response_ms = Math.min(Math.round(performance.now() - shownAt), 24 * 3600 * 1000);
  writeOutbox([...readOutbox(), { assignment_id: pair.assignment_id, choice, response_ms }]);
  root.setAttribute("aria-busy", "true");
  buttons.forEach((button) => {
    button.disabled = true;
    button.classList.toggle("chosen", button.dataset.choice === choice);
  });
  const turn = await sendOutbox();
  sending = false;
  if (turn) show(turn); else start();
}

const keys = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", " ": "tie" };
document.addEventListener("keydown", (event) => {
  const choice = keys[event.key];
  const busy = event.repeat || event.isComposing || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey;
  if (!choice || busy || event.target.closest?.("input, textarea, select, [contenteditable]")) return;
  if (event.key === " " && event.target.closest?.("button")) return;  // the space bar presses a focused button
  event.preventDefault();
  vote(choice);
});
buttons.forEach((button) => button.addEventListener("click", (event) => {
  if (event.detail > 0) button.blur();  // after a mouse click the space bar shall mean "tie" again
  vote(button.dataset.choice);
}));
start();
