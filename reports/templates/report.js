(() => {
  "use strict";
  const cards = [...document.querySelectorAll(".card")];
  const filter = document.getElementById("filter");
  if (filter) {
    const more = document.getElementById("more"), shown = document.getElementById("shown");
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const card of cards) {
        card.hidden = !words.every((word) => card.dataset.prompt.includes(word));
        count += !card.hidden;
      }
      more.open = words.length > 0;
      shown.textContent = words.length ? `${count} of ${cards.length} prompts` : "";
    });
  }

  const dialog = document.getElementById("large");
  const [image, who, scores, prompt] = ["img", "b", "span", ".fine"].map((name) => dialog.querySelector(name));
  let photos = [], at = 0;
  const show = (index) => {
    at = (index + photos.length) % photos.length;
    const small = photos[at].querySelector("img");
    image.src = small.src;
    image.alt = small.alt;
    image.className = small.className;
    who.textContent = photos[at].dataset.who;
    scores.textContent = photos[at].dataset.scores;
    prompt.textContent = photos[at].closest(".card").querySelector("h3").textContent;
  };
  document.addEventListener("click", (event) => {
    const photo = event.target.closest(".photo");
    if (!photo) return;
    photos = [...photo.closest(".card").querySelectorAll(".photo")];
    show(photos.indexOf(photo));
    dialog.showModal();
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowDown") show(at + 1);
    else if (event.key === "ArrowLeft" || event.key === "ArrowUp") show(at - 1);
    else return;
    event.preventDefault();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.tagName === "BUTTON") dialog.close();
  });
})();
