// The value under the pointer: the nearest column and row of the chart's `data-values`, places in fractions of its SVG.
const tip = document.getElementById("pointer");
const nearest = (places, place) =>
  places.reduce((best, _, i) => (Math.abs(places[i] - place) < Math.abs(places[best] - place) ? i : best), 0);

for (const chart of document.querySelectorAll("[data-values]")) {
  const { box, xs, ys, columns, rows, texts } = JSON.parse(chart.dataset.values);
  const show = (event) => {
    const frame = chart.querySelector("svg").getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width;
    const y = (event.clientY - frame.top) / frame.height;
    tip.hidden = x < box[0] || x > box[2] || y < box[1] || y > box[3];
    if (tip.hidden) return;
    const column = nearest(xs, x);
    const row = nearest(ys, y);
    tip.textContent = [rows[row], columns[column]].filter(Boolean).join(", ") + "\n" + texts[row][column];
    const left = event.clientX + (x < 0.5 ? 14 : -14 - tip.offsetWidth);
    tip.style.left = Math.max(4, Math.min(left, innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)) + "px";
  };
  chart.addEventListener("pointermove", show);
  chart.addEventListener("pointerdown", show);
  chart.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch") tip.hidden = true; // a finger leaves when it lifts
  });
}
document.getElementById("pointing").hidden = false;
addEventListener("scroll", () => (tip.hidden = true), { passive: true });
