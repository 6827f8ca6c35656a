// The browser of samples: search, kept or dropped, pages.
const PER_PAGE = matchMedia("(max-width: 800px)").matches ? 12 : 24;
const browser = { view: "all", page: 1, matches: null };
let hay = null; // what is searched, made at the first search

function haystack() {
  hay ??= Array.from(ids, (id, place) => {
    const label = labels[place] >= 0 ? data.classes[labels[place]] : "";
    return ("#" + id + " " + label + " " + (data.captions ? data.captions[place] : "")).toLowerCase();
  });
  return hay;
}

// Places, ascending, that have all words of the search, and a picture if asked for.
function find() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const only = $("with-picture") && $("with-picture").checked;
  let places = only ? Array.from(pictured) : Array.from(ids, (_, place) => place);
  if (words.length) {
    const texts = haystack();
    places = places.filter((place) => words.every((word) => /^#\d+$/.test(word) ? "#" + ids[place] === word : texts[place].includes(word)));
  }
  browser.matches = places;
  browser.page = 1;
}

// Ranges of `matches` that the view shows.
function ranges() {
  const all = browser.matches, cut = bisect(all, state.place), end = bisect(all, scored), nulls = dropNulls.checked;
  if (browser.view === "kept") return [[cut, nulls ? end : all.length]];
  if (browser.view === "dropped") return nulls ? [[0, cut], [end, all.length]] : [[0, cut]];
  return browser.view === "unscored" ? [[end, all.length]] : [[0, all.length]];
}

function drawSamples() {
  const parts = ranges(), total = parts.reduce((sum, [a, b]) => sum + b - a, 0);
  const pages = Math.max(1, Math.ceil(total / PER_PAGE)), places = [];
  browser.page = Math.min(Math.max(1, browser.page), pages);
  const start = (browser.page - 1) * PER_PAGE, turned = $("order").value === "down";
  for (let i = start; i < Math.min(start + PER_PAGE, total); i++) {
    let at = turned ? total - 1 - i : i;
    for (const [a, b] of parts) {
      if (at < b - a) { places.push(browser.matches[a + at]); break; }
      at -= b - a;
    }
  }
  $("page").replaceChildren(...places.map((place) => card(place, fate(place))));
  const named = { all: "", kept: " kept", dropped: " dropped", unscored: " without a score" }[browser.view];
  $("found").textContent = `${count(total)}${named} of ${count(size)} samples on this page` + (total ? "" : ". Search for something else.");
  $("number").value = browser.page;
  $("number").max = pages;
  $("pages").textContent = count(pages);
  $("first").disabled = $("before").disabled = browser.page === 1;
  $("last").disabled = $("next").disabled = browser.page === pages;
}

function goTo(page) { browser.page = page; drawSamples(); }

let searching = 0;
$("search").addEventListener("input", () => {
  clearTimeout(searching);
  searching = setTimeout(() => { find(); drawSamples(); }, 120);
});
for (const button of $("views").querySelectorAll("button")) {
  button.addEventListener("click", () => {
    for (const other of $("views").querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    browser.view = button.dataset.view;
    goTo(1);
  });
}
if ($("with-picture")) $("with-picture").addEventListener("change", () => { find(); drawSamples(); });
$("order").addEventListener("change", () => goTo(1));
$("first").addEventListener("click", () => goTo(1));
$("before").addEventListener("click", () => goTo(browser.page - 1));
$("next").addEventListener("click", () => goTo(browser.page + 1));
$("last").addEventListener("click", () => goTo(Infinity));
$("number").addEventListener("change", () => goTo(Number($("number").value) || 1));
$("views").querySelector('[data-view="unscored"]').hidden = size === scored;

find();
follow($("page"), drawSamples);
setCut(data.cut);
