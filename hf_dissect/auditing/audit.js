"use strict";

const PAGE_SIZE = 50;
const ROWS_A_FOLDER = 1000;
const BARS = 60;

const element = (id) => document.getElementById(id);
const data = JSON.parse(element("pairs").textContent);
const size = data.caption.length;
const unpictured = data.unpictured === null ? null : new Set(data.unpictured);
const measures = new Map(data.measures.map((measure) => [measure.key, measure]));
const orders = new Map(); // measure -> indices of the pairs by rising value
const storage = `hf_dissect.audit.${element("pairs").dataset.audit}`;
const marks = new Map(Object.entries(stored(storage, {})));
let lowered = null; // captions for the text filter, made when it is first used
let descending = false;
let shown = []; // indices of the pairs that pass the filters, in order
let page = 0;
let current = 0; // place on the page of the pair that the keys act on

// ---- what the browser remembers: nothing where it keeps no storage for files ----

function stored(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function store(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // the marks are still there until the page is closed
  }
}

// ---- which pairs, in which order ----

function measure() {
  return measures.get(element("measure").value);
}

function order(values, key) {
  if (!orders.has(key)) {
    const last = (value) => (value === null ? Infinity : value);
    const indices = Uint32Array.from({ length: size }, (_, index) => index);
    orders.set(key, indices.sort((a, b) => last(values[a]) - last(values[b]) || a - b));
  }
  return orders.get(key);
}

function bound(id, otherwise) {
  const value = element(id).valueAsNumber;
  return Number.isNaN(value) ? otherwise : value;
}

function select() {
  const { key, values } = measure();
  const words = element("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length) lowered ??= data.caption.map((caption) => caption.toLowerCase());
  const low = bound("low", -Infinity);
  const high = bound("high", Infinity);
  const ranged = low !== -Infinity || high !== Infinity;
  const wanted = element("marked").value;
  shown = Array.from(order(values, key)).filter(
    (index) =>
      (!ranged || (values[index] !== null && values[index] >= low && values[index] <= high)) &&
      (!wanted || (marks.get(data.id[index]) ?? "none") === wanted) &&
      words.every((word) => lowered[index].includes(word)),
  );
  if (descending) {
    const unknown = shown.filter((index) => values[index] === null);
    shown = [...shown.filter((index) => values[index] !== null).reverse(), ...unknown];
  }
  go(0);
}

// ---- one page of pairs ----

function pages() {
  return Math.max(1, Math.ceil(shown.length / PAGE_SIZE));
}

function go(number, place = 0, focus = false) {
  page = Math.min(Math.max(number, 0), pages() - 1);
  const first = page * PAGE_SIZE;
  const indices = shown.slice(first, first + PAGE_SIZE);
  element("list").replaceChildren(...indices.map(card));
  element("list").start = first + 1;
  element("nothing").hidden = indices.length > 0;
  element("page").value = page + 1;
  element("page").max = pages();
  element("pages").textContent = pages().toLocaleString("en");
  element("previous").disabled = page === 0;
  element("next").disabled = page === pages() - 1;
  const span = indices.length ? `${(first + 1).toLocaleString("en")}–${(first + indices.length).toLocaleString("en")} of ` : "";
  const all = shown.length < size ? ` (${size.toLocaleString("en")} without filters)` : "";
  element("status").textContent = `${span}${shown.length.toLocaleString("en")} pairs${all}`;
  move(place < 0 ? indices.length - 1 : place, focus);
}

function move(place, focus = true) {
  const cards = element("list").children;
  if (place >= cards.length && page < pages() - 1) return go(page + 1, 0, true);
  if (place < 0 && page > 0) return go(page - 1, -1, true);
  cards[current]?.setAttribute("tabindex", "-1");
  current = Math.min(Math.max(place, 0), Math.max(cards.length - 1, 0));
  cards[current]?.setAttribute("tabindex", "0");
  if (focus) cards[current]?.focus();
}

function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function card(index) {
  const meta = make("p", { className: "meta" });
  for (const { key, name, values, digits } of data.measures) {
    if (values[index] === null) continue;
    const part = make("span", {}, `${name} ${values[index].toFixed(digits)}`);
    if (key === "p_mismatched") {
      const filled = make("span", {});
      filled.style.width = `${100 * values[index]}%`;
      part.prepend(make("span", { className: "meter", ariaHidden: "true" }, filled));
    }
    meta.append(part);
  }
  if (data.clean && data.clean[index] !== null) {
    const [name, text] = data.clean[index] ? ["clean", "✓ truth: matched"] : ["mismatched", "✗ truth: mismatched"];
    meta.append(make("span", { className: name }, text));
  }
  meta.append(make("span", { className: "id" }, `#${data.id[index]}`));
  if (data.source?.[index]) meta.append(make("span", { className: "id", dir: "auto" }, data.source[index]));
  const caption = make("p", { className: "caption", dir: "auto" }, data.caption[index]);
  const buttons = ["mismatched", "fine"].map((mark) => markButton(index, mark));
  const parts = [make("div", {}, caption, meta), make("div", { className: "marks" }, ...buttons)];
  if (unpictured !== null) parts.unshift(picture(index));
  const item = make("li", { className: unpictured === null ? "without" : "", tabIndex: -1 }, ...parts);
  item.dataset.index = index;
  return item;
}

function picture(index) {
  const row = data.row[index];
  const frame = make("div", { className: "picture" });
  if (unpictured.has(row)) {
    frame.append("no picture");
    return frame;
  }
  const image = make("img", { alt: `Image of pair ${data.id[index]}`, loading: "lazy", decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) <= 64));
  image.addEventListener("error", () => frame.replaceChildren("no picture"));
  image.src = `${data.folder}/${Math.floor(row / ROWS_A_FOLDER)}/${row}.jpg`;
  frame.append(image);
  return frame;
}

// ---- marks ----

function markButton(index, mark) {
  const button = make("button", { type: "button", ariaPressed: String(marks.get(data.id[index]) === mark) }, mark);
  button.dataset.mark = mark;
  button.addEventListener("click", () => toggle(button.closest("li"), mark));
  return button;
}

function toggle(item, mark) {
  const id = data.id[item.dataset.index];
  if (marks.get(id) === mark) marks.delete(id);
  else marks.set(id, mark);
  for (const button of item.querySelectorAll("[data-mark]")) {
    button.ariaPressed = String(marks.get(id) === button.dataset.mark);
  }
  store(storage, Object.fromEntries(marks));
  countMarks();
}

function countMarks() {
  element("download").disabled = marks.size === 0;
  element("download").textContent = `Download marks (${marks.size.toLocaleString("en")})`;
}

function download() {
  const lines = data.id.flatMap((id, index) => (marks.has(id) ? [`${id},${data.row[index]},${marks.get(id)}`] : []));
  const file = new Blob([["sample_id,row,mark", ...lines, ""].join("\n")], { type: "text/csv" });
  const link = make("a", { href: URL.createObjectURL(file), download: "marks.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
}

// ---- the distribution of the measure ----

function histogram() {
  const { name, values, digits } = measure();
  const known = values.filter((value) => value !== null);
  const low = known.reduce((least, value) => Math.min(least, value), Infinity);
  const high = known.reduce((most, value) => Math.max(most, value), -Infinity);
  if (!(high > low)) return element("histogram").replaceChildren();
  const counts = new Array(BARS).fill(0);
  const suspicion = new Array(BARS).fill(0);
  const suspected = measures.get("p_mismatched").values;
  values.forEach((value, index) => {
    if (value === null) return;
    const bar = Math.min(BARS - 1, Math.floor(((value - low) / (high - low)) * BARS));
    counts[bar] += 1;
    suspicion[bar] += suspected[index] ?? 0;
  });
  const most = Math.max(...counts);
  const namespace = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(namespace, "svg");
  drawing.setAttribute("viewBox", `0 0 ${BARS} 100`);
  drawing.setAttribute("preserveAspectRatio", "none");
  counts.forEach((count, bar) => {
    let top = 100;
    for (const [color, part] of [["--bar-bad", suspicion[bar]], ["--bar", count - suspicion[bar]]]) {
      const height = (100 * part) / most;
      top -= height;
      const box = document.createElementNS(namespace, "rect");
      const place = { x: bar + 0.06, y: top, width: 0.88, height };
      for (const [key, value] of Object.entries(place)) box.setAttribute(key, value.toFixed(3));
      box.style.fill = `var(${color})`;
      drawing.append(box);
    }
  });
  const ends = [low.toFixed(digits), `${name} of all pairs; orange: the share that is likely mismatched`, high.toFixed(digits)];
  element("histogram").replaceChildren(drawing, make("div", {}, ...ends.map((text) => make("span", {}, text))));
}

// ---- what the reader does ----

function later(action, milliseconds) {
  let timer = null;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds);
  };
}

function chooseMeasure() {
  element("low").value = element("high").value = "";
  direct(measure().descending ?? false);
  histogram();
  select();
}

function direct(downwards) {
  descending = downwards;
  element("direction").ariaPressed = String(descending);
  element("direction").textContent = descending ? "↓ highest first" : "↑ lowest first";
}

function clearFilters() {
  for (const id of ["text", "low", "high", "marked"]) element(id).value = "";
  select();
}

const KEYS = {
  j: () => move(current + 1),
  ArrowDown: () => move(current + 1),
  k: () => move(current - 1),
  ArrowUp: () => move(current - 1),
  PageDown: () => go(page + 1, 0, true),
  ArrowRight: () => go(page + 1, 0, true),
  PageUp: () => go(page - 1, 0, true),
  ArrowLeft: () => go(page - 1, 0, true),
  Home: () => go(0, 0, true),
  End: () => go(pages() - 1, 0, true),
  "/": () => element("text").focus(),
  m: () => markCurrent("mismatched"),
  f: () => markCurrent("fine"),
};

function markCurrent(mark) {
  const item = element("list").children[current];
  if (item) toggle(item, mark);
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select")) {
    if (event.key !== "Escape") return;
    event.preventDefault(); // or the search field would be emptied
    move(current);
    return;
  }
  if (!Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  store("hf_dissect.theme", name);
}

function begin() {
  for (const { key, name } of data.measures) element("measure").append(make("option", { value: key }, name));
  const chosen = stored("hf_dissect.theme", null);
  if (chosen === "dark" || chosen === "light") theme(chosen);
  element("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    theme(dark ? "light" : "dark");
  });
  element("tools").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["text", "low", "high"]) element(id).addEventListener("input", later(select, 120));
  element("measure").addEventListener("change", chooseMeasure);
  element("marked").addEventListener("change", select);
  element("direction").addEventListener("click", () => {
    direct(!descending);
    select();
  });
  element("clear").addEventListener("click", clearFilters);
  element("previous").addEventListener("click", () => go(page - 1));
  element("next").addEventListener("click", () => go(page + 1));
  element("page").addEventListener("change", () => go(bound("page", page + 1) - 1));
  element("download").addEventListener("click", download);
  element("list").addEventListener("focusin", (event) => {
    const place = Array.prototype.indexOf.call(element("list").children, event.target.closest("li"));
    if (place >= 0 && place !== current) move(place, false);
  });
  document.addEventListener("keydown", press);
  countMarks();
  chooseMeasure();
}

begin();
