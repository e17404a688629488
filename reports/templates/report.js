(() => {
  "use strict";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);

  // The state of the page lives behind the # of its address, so that a link shows what its sender saw.
  const state = new URLSearchParams(location.hash.startsWith("#?") ? location.hash.slice(2) : "");
  const remember = (changes) => {
    for (const [name, value] of Object.entries(changes)) {
      if (value) state.set(name, value);
      else state.delete(name);
    }
    history.replaceState(null, "", state.size ? `#?${state}` : location.pathname + location.search);
  };

  // language: both are in the page, and its style hides one; attributes and options hold one at a time
  const words = JSON.parse(byId("words").textContent);
  let language = "en";
  const speak = (to) => {
    language = to;
    document.documentElement.lang = to;
    for (const option of all("option[data-zh]")) option.textContent = option.dataset[to];
    for (const name of ["aria-label", "title", "placeholder"]) {
      for (const element of all(`[data-zh-${name}]`)) {
        const kept = `data-en-${name}`;
        if (!element.hasAttribute(kept)) element.setAttribute(kept, element.getAttribute(name));
        element.setAttribute(name, element.getAttribute(`data-${to}-${name}`));
      }
    }
  };
  const say = (key, values) => words[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
  byId("language").addEventListener("click", () => {
    speak(language === "en" ? "zh" : "en");
    remember({ lang: language });
  });
  speak(state.get("lang") || (navigator.language.startsWith("zh") ? "zh" : "en"));

  // tables: a click on a heading sorts, another turns round
  const number = (text) => {
    const found = text.replace(/\u2212/g, "-").replace(/(\d),(?=\d{3})/g, "$1").match(/^\s*[-+]?\d+(\.\d+)?/);
    return found ? parseFloat(found[0]) : NaN;
  };
  for (const table of all("table.sortable")) {
    const headings = all("thead th", table), body = table.tBodies[0];
    headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].textContent.trim();
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [number(key(a)), number(key(b))];
        if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;  // what has no value stands last, either way
        const order = isNaN(x) ? key(a).localeCompare(key(b)) : x - y;
        return down ? -order : order;
      });
      body.append(...rows);
      table.classList.toggle("resorted", column > 0);
    }));
  }

  const copies = JSON.parse(byId("copies").textContent);
  const put = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // opened from disk, some browsers give no clipboard
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };
  for (const button of all(".copy")) {
    button.addEventListener("click", async () => {
      await put(copies[button.dataset.copy]);
      const label = [...button.childNodes];
      button.textContent = say("copied");
      setTimeout(() => button.replaceChildren(...label), 1200);
    });
  }

  if (!byId("images")) return;  // a page about training alone

  // prompts: filter and order
  const grid = byId("cards"), more = byId("more"), filter = byId("filter"), order = byId("order");
  const cards = [...all("#cards > .card"), ...all("#more .card")];
  const arrange = () => {
    const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const card of cards) {
      card.hidden = !wanted.every((word) => card.dataset.prompt.includes(word));
      count += !card.hidden;
    }
    const name = `apart${order.value}`;
    const sorted = order.value === "" ? cards : [...cards].sort((a, b) => b.dataset[name] - a.dataset[name]);
    const open = grid.childElementCount;
    grid.append(...sorted.slice(0, open));
    if (more) {
      more.querySelector(".cards").append(...sorted.slice(open));
      more.open = more.open || wanted.length > 0;
    }
    byId("shown").textContent = wanted.length ? say("shown", { count, of: cards.length }) : "";
    remember({ q: filter.value, order: order.value });
  };
  filter.addEventListener("input", arrange);
  order.addEventListener("change", arrange);

  // evidence: the pictures behind a number: the lowest score or the largest difference first; all, of a set's number
  const evidence = byId("evidence");
  const prove = (at, by, against) => {
    const value = (photo) => by ? JSON.parse(photo.dataset.values)[by] : 0;
    const found = [];
    for (const card of cards) {
      const here = all(".photo", card);
      const mine = here.find((photo) => photo.dataset.at === at);
      const other = against && here.find((photo) => photo.dataset.at === against);
      if (!mine || value(mine) === undefined || (against && (!other || value(other) === undefined))) continue;
      found.push({ photos: other ? [mine, other] : [mine], size: other ? value(mine) - value(other) : value(mine) });
    }
    found.sort((a, b) => against ? Math.abs(b.size) - Math.abs(a.size) : a.size - b.size);
    evidence.hidden = false;
    evidence.querySelector("h3").textContent = [by, at].filter(Boolean).join(": ") + (against ? ` \u2212 ${against}` : "");
    const order = !by ? "all" : against ? "largest" : "lowest";
    evidence.querySelector(".note").textContent = say(order, { count: found.length });
    evidence.querySelector(".strip").replaceChildren(...found.map(({ photos, size }) => {
      const item = document.createElement("div");
      item.className = "card";
      item.dataset.prompt = photos[0].closest(".card").dataset.prompt;
      const title = Object.assign(document.createElement("p"), { className: "fine", dir: "auto" });
      title.textContent = photos[0].closest(".card").querySelector("h3").textContent;
      const score = Object.assign(document.createElement("p"), { className: "fine" });
      score.textContent = by ? size.toFixed(3).replace("-", "\u2212") : "";
      item.append(...photos.map((photo) => photo.cloneNode(true)), score, title);
      return item;
    }));
    remember({ at, by, against });
  };
  for (const link of all("a[data-at]")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      prove(link.dataset.at, link.dataset.by, link.dataset.against);
      evidence.scrollIntoView();
    });
  }

  // the enlarged view: one picture, two side by side, flickering, or with a slider; zoom and position are shared
  const dialog = byId("large"), other = byId("other"), split = byId("split");
  const panes = all(".pane", dialog), modes = all("[data-mode]", dialog);
  let photos = [], at = 0, mode = "one", timer = 0, zoom = 1, x = 0, y = 0;
  const place = () => {
    for (const image of all(".glass img", dialog)) image.style.transform = `translate(${x}px, ${y}px) scale(${zoom})`;
  };
  const fill = (pane, photo) => {
    const [image, small] = [pane.querySelector("img"), photo.querySelector("img")];
    image.src = small.src;
    image.alt = small.alt;
    image.className = small.className;
    pane.querySelector("figcaption").textContent = `${photo.dataset.who}: ${photo.dataset.scores}`;
  };
  const draw = () => {
    fill(panes[0], photos[at]);
    fill(panes[1], photos[+other.value || 0]);
    dialog.dataset.mode = mode;
    split.hidden = mode !== "slide";
    modes.forEach((button) => button.setAttribute("aria-pressed", button.dataset.mode === mode));
    clearInterval(timer);
    dialog.classList.remove("swapped");
    if (mode === "flick") timer = setInterval(() => dialog.classList.toggle("swapped"), 700);
    dialog.style.setProperty("--split", `${split.value}%`);
    place();
  };
  const step = (by) => { at = (at + by + photos.length) % photos.length; draw(); };
  const magnify = (by) => {
    zoom = Math.min(8, Math.max(1, zoom * by));
    if (zoom === 1) x = y = 0;
    place();
  };
  const enlarge = (photo) => {
    const card = photo.closest(".card");
    photos = all(".photo", card);
    at = photos.indexOf(photo);
    other.replaceChildren(...photos.map((one, i) => new Option(one.dataset.who, i)));
    other.value = photos.length > 1 ? (at + 1) % photos.length : 0;
    dialog.querySelector(".prompt").textContent = (card.querySelector("h3, h4, p[dir]") || {}).textContent || "";
    [zoom, x, y] = [1, 0, 0];
    draw();
    dialog.showModal();
    modes.find((button) => button.dataset.mode === mode).focus(); // not the list, which would take the arrow keys
  };
  document.addEventListener("click", (event) => {
    const photo = event.target.closest(".photo");
    if (photo) enlarge(photo);
  });
  other.addEventListener("change", () => { if (mode === "one") mode = "side"; draw(); });
  split.addEventListener("input", draw);
  modes.forEach((button) => button.addEventListener("click", () => { mode = button.dataset.mode; draw(); }));
  dialog.addEventListener("keydown", (event) => {
    if (event.target === other || event.target === split) return;
    const keys = { ArrowRight: () => step(1), ArrowDown: () => step(1), ArrowLeft: () => step(-1), ArrowUp: () => step(-1),
      "+": () => magnify(1.25), "=": () => magnify(1.25), "-": () => magnify(0.8) };
    modes.forEach((button, i) => { keys[i + 1] = () => { mode = button.dataset.mode; draw(); }; });
    if (!keys[event.key]) return;
    keys[event.key]();
    event.preventDefault();
  });
  dialog.addEventListener("wheel", (event) => {
    event.preventDefault();
    magnify(event.deltaY < 0 ? 1.15 : 1 / 1.15);
  }, { passive: false });
  dialog.addEventListener("pointermove", (event) => {
    if (!event.buttons || zoom === 1 || !event.target.closest(".glass")) return;
    [x, y] = [x + event.movementX, y + event.movementY];
    place();
  });
  dialog.addEventListener("close", () => clearInterval(timer));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.classList.contains("close")) dialog.close();
  });

  // what the address asks for
  if (state.get("q") || state.get("order")) {
    filter.value = state.get("q") || "";
    order.value = state.get("order") || "";
    arrange();
  }
  if (state.get("at")) {
    prove(state.get("at"), state.get("by") || undefined, state.get("against") || undefined);
    evidence.scrollIntoView();
  }
})();
