// Votes and undos on their way: kept in the browser until the server has confirmed them, sent one by one, in order.
const outbox = {
  key: "",
  memory: "[]",          // where the browser gives no storage
  sending: null,         // the promise of the round in progress

  read() {
    try { return JSON.parse(localStorage.getItem(this.key) ?? "[]"); } catch { return JSON.parse(this.memory); }
  },
  write(entries) {
    this.memory = JSON.stringify(entries);
    try { localStorage.setItem(this.key, this.memory); } catch { /* kept in memory */ }
  },
  add(path, body) { this.write([...this.read(), { path, body }]); },
  holds(assignment) { return this.read().some(({ body }) => body.assignment_id === assignment); },

  // Send all that waits; returns the last answer, or null where the server refused it for good.
  send() {
    this.sending ??= this.round().finally(() => { this.sending = null; });
    return this.sending;
  },
  async round() {
    let answer = null;
    for (let entries = this.read(); entries.length; entries = this.read()) {
      const [first] = entries;
      const [status, body] = await post(first.path, first.body);
      answer = status === 200 ? body : null;
      this.write(this.read().filter(({ path, body: kept }) => path !== first.path || kept.key !== first.body.key));
    }
    return answer;
  },
};

const pause = (ms) => new Promise((resolve) => {
  const timer = setTimeout(resolve, ms);
  addEventListener("online", () => { clearTimeout(timer); resolve(); }, { once: true });
});

// Ask until there is an answer: a lost connection or a restarting server only delays. Returns [status, body].
async function ask(path, options = {}) {
  for (let wait = 500; ; wait = Math.min(wait * 2, 15000)) {
    try {
      const answer = await fetch(`${base}${path}`, { cache: "no-store", ...options });
      if (answer.status < 500 && answer.status !== 429) {
        notice(null);
        return [answer.status, await answer.json().catch(() => null)];
      }
      notice(answer.status === 429 ? "busy" : "database");
      wait = Math.max(wait, 1000 * Number(answer.headers.get("Retry-After") ?? 0));
    } catch { notice("offline"); }
    await pause(wait);
  }
}

const post = (path, body) => ask(path, {
  method: "POST", keepalive: true, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
});

// A vote attempt's own key; crypto.randomUUID exists only on https and localhost.
const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((n) => n.toString(16).padStart(2, "0")).join("");
