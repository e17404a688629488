// Both pictures are enlarged and moved together: one scale and one point of the picture, in shares of its size.
const zoom = {
  scale: 1, x: 0.5, y: 0.5,
  images: [],

  attach(frames) {
    this.images = frames.map((frame) => frame.querySelector("img"));
    for (const frame of frames) {
      frame.addEventListener("pointermove", (event) => {
        if (this.scale > 1 && (event.pointerType === "mouse" || event.isPrimary)) this.look(frame, event);
      });
      frame.addEventListener("dblclick", (event) => { this.look(frame, event); this.toggle(); });
      frame.addEventListener("wheel", (event) => {
        if (!event.ctrlKey && this.scale === 1 && event.deltaY > 0) return;  // scrolling the page down stays that
        event.preventDefault();
        this.look(frame, event);
        this.to(this.scale * Math.exp(-event.deltaY / 300));
      }, { passive: false });
      this.pinch(frame);
    }
  },
  pinch(frame) {
    let start = null;
    const distance = ({ touches: [a, b] }) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    frame.addEventListener("touchstart", (event) => {
      if (event.touches.length === 2) start = { distance: distance(event), scale: this.scale };
    }, { passive: true });
    frame.addEventListener("touchmove", (event) => {
      if (event.touches.length === 2 && start) {
        event.preventDefault();
        this.to(start.scale * distance(event) / start.distance);
      } else if (this.scale > 1) event.preventDefault();
    }, { passive: false });
  },
  look(frame, { clientX, clientY }) {
    const box = frame.getBoundingClientRect();
    this.x = Math.min(1, Math.max(0, (clientX - box.left) / box.width));
    this.y = Math.min(1, Math.max(0, (clientY - box.top) / box.height));
    this.draw();
  },
  to(scale) { this.scale = Math.min(8, Math.max(1, scale)); this.draw(); },
  toggle() { this.to(this.scale > 1 ? 1 : 3); },
  reset() { this.scale = 1; this.x = this.y = 0.5; this.draw(); },
  draw() {
    for (const image of this.images) {
      image.style.transformOrigin = `${100 * this.x}% ${100 * this.y}%`;
      image.style.transform = this.scale > 1 ? `scale(${this.scale})` : "";
    }
    part("zoom-text").textContent = text(this.scale > 1 ? "zoom_out" : "zoom");
  },
};
