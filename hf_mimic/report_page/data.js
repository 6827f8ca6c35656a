"use strict";
// The rows of this page, in the order of their score; those without a score come last. All text is set as textContent.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);

function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out.buffer;
}

const scores = new Float32Array(bytes(data.scores)); // (S,), ascending
const ids = new BigInt64Array(bytes(data.ids)); // (N,)
const labels = new Int32Array(bytes(data.labels)); // (N,), -1 for none
const pictured = new Int32Array(bytes(data.pictured)); // places with a picture, ascending
const broken = new Set(new Int32Array(bytes(data.broken)));
const columns = data.columns.map((c) => [c.name, new Float32Array(bytes(c.values))]); // (N,) each
const size = ids.length, scored = scores.length;
const pictureOf = new Map();
pictured.forEach((place, i) => pictureOf.set(place, i));

// The first place in a sorted array, from a to b, whose value is not below x.
function bisect(values, x, a = 0, b = values.length) {
  while (a < b) {
    const middle = (a + b) >> 1;
    if (values[middle] < x) a = middle + 1; else b = middle;
  }
  return a;
}

// For each class, the places of its rows, ascending.
const placesOf = data.classes.map(() => []);
labels.forEach((label, place) => { if (label >= 0) placesOf[label].push(place); });

const numbers = new Intl.NumberFormat("en");
const count = (n) => numbers.format(n);
const share = (n, of) => of ? (100 * n / of).toFixed(1) + " %" : "0.0 %";
function short(x) {
  if (!Number.isFinite(x)) return "-";
  const size = Math.abs(x);
  return size && (size < 1e-3 || size >= 1e6) ? x.toExponential(2) : String(Number(x.toPrecision(4)));
}

function make(name, kind, text) {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
}

function picture(place) {
  const i = pictureOf.get(place);
  if (i === undefined) return make("span", "blank", broken.has(place) ? "broken" : "no picture");
  const image = make("img");
  image.src = "data:image/" + data.kind + ";base64," + data.pictures[i];
  image.alt = "";
  return image;
}

// A sample: its picture, score, label, id, caption and, in the title, all of its values.
function card(place, fate) {
  const node = make("li", "card" + (fate ? " is-" + fate : "")), words = make("span", "words");
  if (pictured.length || broken.size) node.append(picture(place));
  words.append(make("b", "score", place < scored ? short(scores[place]) : "no score"));
  if (labels[place] >= 0) words.append(make("span", "label", data.classes[labels[place]]));
  words.append(make("span", "id", "#" + ids[place]));
  if (data.captions && data.captions[place]) {
    const caption = make("span", "caption", data.captions[place]);
    caption.title = data.captions[place];
    words.append(caption);
  }
  if (fate) words.append(make("span", "fate", fate));
  node.append(words);
  node.title = columns.map(([name, values]) => name + " " + short(values[place])).join("\n");
  return node;
}

// What follows the cut is drawn when it is seen, not before.
const panels = [];
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const panel = panels.find((p) => p.node === entry.target);
    panel.visible = entry.isIntersecting;
    if (panel.visible && panel.stale) { panel.stale = false; panel.draw(); }
  }
}, { rootMargin: "200px" });

function follow(node, draw) {
  panels.push({ node, draw, visible: false, stale: true });
  seen.observe(node);
}

function moved() {
  for (const panel of panels) {
    panel.stale = !panel.visible;
    if (panel.visible) panel.draw();
  }
}

const theme = $("theme");
function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme;
  theme.value = name;
}
theme.addEventListener("change", () => {
  setTheme(theme.value);
  try { localStorage.setItem("hf_mimic theme", theme.value); } catch { /* a frame without storage forgets it */ }
});
try { setTheme(localStorage.getItem("hf_mimic theme") || ""); } catch { /* as above */ }
