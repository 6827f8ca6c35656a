// The cut: slider, numbers, histogram, the line to copy, the nearest samples, the classes.
const slider = $("slider"), valueBox = $("value"), percentBox = $("percent"), dropNulls = $("drop-nulls");
const state = { cut: data.cut, place: 0 }; // scored rows before `place` are dropped
const lowest = scored ? scores[0] : 0, highest = scored ? scores[scored - 1] : 0;

// The slider spans all but the 0.1 % tails, and its ends are the lowest and the highest score.
function span() {
  const level = (q) => scores[Math.min(scored - 1, Math.round(q * (scored - 1)))];
  const low = Math.min(level(0.001), data.cut), high = Math.max(level(0.999), data.cut);
  if (low === high) return [low - Math.max(Math.abs(low), 1e-6) * 0.01, high + Math.max(Math.abs(high), 1e-6) * 0.01];
  const unit = 10 ** Math.floor(Math.log10((high - low) / 100)); // a round number of it
  return [Math.floor(low / unit) * unit, Math.ceil(high / unit) * unit];
}
const [low, high] = span();
const digits = Math.min(20, Math.max(0, Math.ceil(-Math.log10((high - low) / 1000))));
const down = (x) => Number((Math.floor(x * 10 ** digits) / 10 ** digits).toFixed(digits));
const position = (cut) => Math.round(Math.min(1, Math.max(0, (cut - low) / (high - low))) * 1000);

// The number of fewest digits that keeps the same samples.
function shortest(cut) {
  const place = bisect(scores, cut);
  for (let d = 2; d < 17; d++) if (bisect(scores, Number(cut.toPrecision(d))) === place) return Number(cut.toPrecision(d));
  return cut;
}

function cutAt(at) {
  if (at <= 0) return Math.min(down(lowest), Number(low.toFixed(digits)));
  if (at >= 1000) return shortest(highest);
  return Number((low + at / 1000 * (high - low)).toFixed(digits));
}

const SVG = "http://www.w3.org/2000/svg";
function shape(name, values) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(values)) node.setAttribute(key, value);
  return node;
}

// The bars twice, one above the other: what is left of the cut shows the second ones.
const line = shape("line", { y1: 0, y2: 120 }), clip = shape("rect", { x: 0, y: 0, width: 0, height: 120 });
function drawHistogram() {
  const bins = new Float64Array(100), svg = $("histogram");
  for (const score of scores) bins[Math.min(99, Math.max(0, Math.floor((score - low) / (high - low) * 100)))]++;
  const most = Math.max(1, ...bins);
  let path = "";
  bins.forEach((n, i) => { if (n) path += `M${i * 10},120V${120 - Math.max(1.5, n / most * 116)}h9V120Z`; });
  const mask = shape("clipPath", { id: "left" });
  mask.append(clip);
  svg.append(mask, shape("path", { d: path, class: "kept" }), shape("path", { d: path, class: "dropped", "clip-path": "url(#left)" }), line);
  $("low").textContent = short(low);
  $("high").textContent = short(high);
}

const unscoredDropped = () => dropNulls.checked ? size - scored : 0;
function fate(place) {
  if (place < scored) return place < state.place ? "dropped" : "kept";
  return dropNulls.checked ? "dropped" : "kept";
}

function filterLine() {
  const keep = dropNulls.checked ? "s is not None and s >= " : "s is None or s >= ";
  return `curated = scored.filter(lambda s: ${keep}${python(state.cut)}, input_columns="${data.score}")`;
}
const python = (x) => Object.is(x, -0) ? "0" : String(x);

let telling = 0;
function tell() { // once the cut rests: a reader of screens is not told every step
  clearTimeout(telling);
  telling = setTimeout(() => { $("status").textContent = `${$("kept").textContent} kept, ${$("dropped").textContent} dropped`; }, 300);
}

function drawCounts() {
  const dropped = state.place + unscoredDropped(), kept = size - dropped;
  $("kept").textContent = count(kept);
  $("dropped").textContent = count(dropped);
  $("kept-share").textContent = share(kept, size);
  $("dropped-share").textContent = share(dropped, size);
  const x = Math.min(1000, Math.max(0, (state.cut - low) / (high - low) * 1000));
  line.setAttribute("x1", x);
  line.setAttribute("x2", x);
  clip.setAttribute("width", x);
  slider.setAttribute("aria-valuetext", `${state.cut}: ${count(kept)} kept, ${share(kept, size)}`);
  $("line").textContent = filterLine();
  $("meaning").textContent = dropNulls.checked ? "Rows without a score are dropped." : "Rows without a score are kept.";
}

// Up to `most` places from `from` on, in direction `step`, with a picture if asked for.
function nearest(from, step, most) {
  const found = [], only = $("pictured") && $("pictured").checked && pictured.length;
  if (only) {
    let i = bisect(pictured, step > 0 ? from : from + 1) - (step > 0 ? 0 : 1);
    for (; i >= 0 && i < pictured.length && pictured[i] < scored && found.length < most; i += step) found.push(pictured[i]);
  } else {
    for (let p = from; p >= 0 && p < scored && found.length < most; p += step) found.push(p);
  }
  return found;
}
function drawNearest() {
  for (const [id, places] of [["below", nearest(state.place - 1, -1, 6)], ["above", nearest(state.place, 1, 6)]]) {
    $(id).replaceChildren(...places.map((p) => card(p, fate(p))));
    if (!places.length) $(id).append(make("li", "soft", "none"));
  }
}

const rows = [...document.querySelectorAll("#by-class tbody tr")].map((tr) => ({
  places: placesOf[Number(tr.dataset.code)], kept: tr.querySelector(".kept-cell"), share: tr.querySelector(".share-cell"), bar: tr.querySelector("i"),
}));
function drawClasses() {
  for (const row of rows) {
    let dropped = bisect(row.places, state.place);
    if (dropNulls.checked) dropped += row.places.length - bisect(row.places, scored);
    const kept = row.places.length - dropped;
    row.kept.textContent = count(kept);
    row.share.textContent = share(kept, row.places.length);
    row.bar.style.width = 100 * kept / row.places.length + "%";
  }
}

function setCut(cut, from) {
  if (!Number.isFinite(cut)) return;
  state.cut = cut;
  state.place = bisect(scores, cut);
  if (from !== slider) slider.value = position(cut);
  if (from !== valueBox) valueBox.value = cut;
  if (from !== percentBox) percentBox.value = scored ? (100 * state.place / scored).toFixed(1) : "0";
  drawCounts();
  moved();
  tell();
}

slider.addEventListener("input", () => setCut(cutAt(Number(slider.value)), slider));
valueBox.addEventListener("input", () => { if (valueBox.value !== "") setCut(Number(valueBox.value), valueBox); });
percentBox.addEventListener("input", () => {
  const percent = Number(percentBox.value);
  if (percentBox.value === "" || !(percent >= 0 && percent <= 100)) return;
  const place = Math.round(percent / 100 * scored);
  setCut(shortest(place < scored ? scores[place] : highest + Math.abs(highest) * 1e-6 + 1e-9), percentBox);
});
$("reset").addEventListener("click", () => setCut(data.cut));
dropNulls.addEventListener("change", () => setCut(state.cut));
if ($("pictured")) $("pictured").addEventListener("change", drawNearest);
$("nulls").hidden = size === scored;

async function copy(text) {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* not allowed in this frame */ }
  const range = document.createRange(), selection = getSelection();
  range.selectNodeContents($("line"));
  selection.removeAllRanges();
  selection.addRange(range);
  return document.execCommand("copy");
}
$("copy").addEventListener("click", async () => {
  $("copied").textContent = await copy($("line").textContent) ? "Copied." : "Not copied: the line is selected, press Ctrl+C.";
});

drawHistogram();
follow($("below").closest(".sides"), drawNearest);
if ($("by-class")) follow($("by-class"), drawClasses);
