(() => {
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const size = data.layers * data.heads;
const $ = (id) => document.getElementById(id);
const PLOT = { displayModeBar: false, responsive: true };
const BLUE = "0,114,178", RED = "178,24,43";
/** A colour behind a text, from −1 to 1; never so strong that the text could not be read on it, dark or light. */
const behind = (share) => `rgba(${share < 0 ? RED : BLUE},${(Math.min(1, Math.abs(share)) * (share < 0 ? 0.55 : 0.7)).toFixed(3)})`;
const EVERYBODY = "", MOST_ROWS = 200;

// numbers

function bytes(text) {
  const raw = atob(text), found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found;
}

function numbers({ kind, data: text }) {
  const raw = bytes(text), view = new DataView(raw.buffer), width = kind === "<f4" ? 4 : 2;
  const found = new Float32Array(raw.length / width);
  for (let i = 0; i < found.length; i++) found[i] = width === 4 ? view.getFloat32(4 * i, true) : half(view.getUint16(2 * i, true));
  return found;
}

function half(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, rest = bits & 1023;
  if (exponent === 31) return rest ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + rest / 1024) * 2 ** (exponent - 15) : rest * 2 ** -24);
}

const kept = new Map();
function once(key, make) {
  if (!kept.has(key)) kept.set(key, make());
  return kept.get(key);
}

const maps = (name) => once(`map|${name}`, () => numbers(data.maps[name]));
const examples = () => once("examples", () => (data.examples ? numbers(data.examples.values) : null));
const family = (name) => once(`family|${name}`, () => numbers(data.families[name].values));
const defined = Object.keys(data.families).filter((name) => !data.families[name].reason);
const isFamily = (name) => Object.hasOwn(data.families, name);
const words = (name) => name.replaceAll("_", " ");

/** Mean and interval of every head over rows of an array. */
function summary(values, rows) {
  const mean = new Float32Array(size), half = new Float32Array(size).fill(NaN), n = rows.length;
  for (const row of rows) for (let i = 0; i < size; i++) mean[i] += values[row * size + i] / n;
  if (n > 1) {
    for (let i = 0; i < size; i++) {
      let sum = 0;
      for (const row of rows) sum += (values[row * size + i] - mean[i]) ** 2;
      half[i] = data.t[n] * Math.sqrt(sum / (n - 1) / n);
    }
  }
  return { mean, half, n };
}

/** The map that is shown: of everybody, of one user, or of a family. */
function shown(name, user) {
  return once(`shown|${name}|${user}`, () => {
    if (isFamily(name)) return { mean: family(name), half: null, n: 0, unit: data.families[name].unit };
    if (user === EVERYBODY) return { ...summary(maps(name), data.users.map((_, i) => i)), unit: data.unit };
    const at = data.users.indexOf(user);
    if (name === data.main && examples()) return { ...summary(examples(), rowsOf(at)), unit: data.unit };
    return { ...summary(maps(name), [at]), unit: data.unit };
  });
}

const rowsOf = (at) => data.examples.user.flatMap((owner, row) => (owner === at ? [row] : []));

function ranks(name, user) {
  return once(`ranks|${name}|${user}`, () => {
    const { mean } = shown(name, user), order = [...mean.keys()].sort((a, b) => mean[b] - mean[a] || a - b);
    const found = new Int32Array(size);
    order.forEach((index, place) => { found[index] = place + 1; });
    return found;
  });
}

const nameOf = (index) => `L${Math.floor(index / data.heads)}H${index % data.heads}`;
function indexOf(name) {
  const match = /^\s*L(\d+)H(\d+)\s*$/i.exec(name);
  if (!match || +match[1] >= data.layers || +match[2] >= data.heads) return -1;
  return +match[1] * data.heads + +match[2];
}

/** A text as plotly shows it letter by letter; as dps_lens.plots.text says it. */
const LETTERS = { "&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "%": "&#37;", "\n": "\u23ce", "\r": "\u23ce" };
const plain = (text) => String(text).replace(/[&<>$%\n\r]/g, (letter) => LETTERS[letter]);

function number(value, digits = 4) {
  return Number.isFinite(value) ? value.toFixed(digits).replace("-", "\u2212") : "\u2013";
}

// elements; text of users and models is only ever set as text

function element(tag, text, attributes = {}) {
  const found = document.createElement(tag);
  if (text !== undefined) found.textContent = text;
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  return found;
}

const MANY_USERS = 15;

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => element("option", text, { value })));
}

/** Users for a selector: by what stands before a colon, where all users have that and some share it. */
function grouped(users) {
  const group = (user) => user.slice(0, Math.max(user.indexOf(":"), 0)), all = new Set(data.users.map(group));
  const entry = (user) => element("option", user, { value: user });
  if (all.has("") || all.size < 2 || all.size === data.users.length) return users.map(entry);
  return [...new Set(users.map(group))].map((name) => {
    const found = element("optgroup", undefined, { label: name });
    found.append(...users.filter((user) => group(user) === name).map(entry));
    return found;
  });
}

/** What a word of a table means. */
const TERMS = {
  "NLL, own": "Negative log-likelihood of the user's own text, with the user's own profile in the prompt.",
  "NLL, no_profile": "The same text without a profile.",
  "NLL, other_user": "The same text with another user's profile.",
  "NLL, neutral": "Negative log-likelihood of text that is nobody's.",
  gain: "What the own profile brings: NLL without a profile minus NLL with the own one.",
  gain_other: "What the own profile brings beyond another user's: NLL with another's minus NLL with the own.",
  gain_left: "The gain that is left under the ablation.",
  gain_left_other: "The gain over another user that is left under the ablation.",
  gain_removed: "The part of the gain that the ablation removes.",
  gain_removed_other: "The part of the gain over another user that the ablation removes.",
  task_cost: "Off-target: what the ablation costs the same task without a profile.",
  neutral_cost: "Off-target: what the ablation costs text that is nobody's.",
  task_cost_other: "Off-target: what the ablation costs over another user's profile.",
  necessity: "What is lost when the heads' outputs come from a run without a profile.",
  sufficiency: "What a run without a profile gets back with the heads' outputs of the own run.",
  necessity_other: "What is lost when the heads' outputs come from a run with another user's profile.",
  sufficiency_other: "What a run with another user's profile gets back with the heads' outputs of the own run.",
  "95% interval": "Student's t over users, one head at a time.",
  rank: "Place of the head among all, the largest score first.",
  population: "A test over users, with family-wise error over all heads.",
  induction: "Family: heads that attend to what followed the same token before.",
  retrieval: "Family: heads that copy a needle out of a long text (arXiv 2404.15574).",
  "function vector": "Family: heads that carry what a few examples ask for (arXiv 2310.15213).",
  found: "The set that find_heads found, by what the finder ranked by.",
};

/** A word, with what it means where it is one of the terms. */
function explained(tag, text, attributes = {}) {
  const found = element(tag, undefined, attributes);
  found.append(Object.hasOwn(TERMS, text) ? element("abbr", text, { title: TERMS[text], tabindex: "0" }) : document.createTextNode(text ?? ""));
  return found;
}

function table(target, head, rows) {
  const cell = (tag) => (value, column) => explained(tag, value, column ? { class: "number" } : {});
  const line = (tag, values) => { const row = element("tr"); row.append(...values.map(cell(tag))); return row; };
  target.replaceChildren(line("th", head), ...rows.map((row) => line("td", row)));
}

const tip = $("tip"), hints = new WeakMap();

function tell(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  tip.style.left = `${Math.max(0, Math.min(x + 12, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(0, Math.min(y + 16, innerHeight - tip.offsetHeight - 8))}px`;
}

/** What is said of an element under the mouse, to the keyboard (`walk`), and to a screen reader. */
function hint(target, text) {
  hints.set(target, text);
  target.addEventListener("mousemove", (event) => { tell(text, event.clientX, event.clientY); });
  target.addEventListener("mouseleave", () => { tip.hidden = true; });
  target.setAttribute("aria-description", text.replaceAll("\n", "; "));
}

/** Arrow keys go from hint to hint inside what has the focus. */
function walk(box, label) {
  if (box.hasAttribute("tabindex")) return box;
  for (const [name, value] of Object.entries({ tabindex: "0", role: "group", "aria-label": `${label}; arrow keys go through it` })) box.setAttribute(name, value);
  let at = -1;
  const leave = () => { box.querySelectorAll(".at").forEach((one) => one.classList.remove("at")); tip.hidden = true; };
  box.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key], all = [...box.querySelectorAll("*")].filter((one) => hints.has(one));
    if (event.key === "Enter" && all[at]) all[at].click();
    if (!move || !all.length) return;
    event.preventDefault();
    at = Math.max(0, Math.min(all.length - 1, at + move));
    leave();
    all[at].classList.add("at");
    all[at].scrollIntoView({ block: "nearest" });
    const { left, bottom } = all[at].getBoundingClientRect();
    tell(hints.get(all[at]), left, bottom - 8);
  });
  box.addEventListener("blur", leave);
  return box;
}

// state, kept in the address

const views = data.views, grid = data.grid;
const texts = grid ? [...new Map(grid.texts.map((one) => [one.key, one]))] : [];
const first = data.tops.length ? data.tops[0] : nameOf(0);
const fresh = {
  tab: "heads", user: EVERYBODY, map: data.main, head: first, view: views.length ? views[0].key : "",
  text: texts.length ? texts[0][0] : "", gamma: grid ? String(grid.gammas[Math.floor(grid.gammas.length / 2)]) : "0",
  k: grid ? String(grid.ks[grid.ks.length - 1]) : "0", overlap: "", ablation: "", mechanism: "", token: "", ask: "", sets: "",
};
let state = read();

function read() {
  const found = { ...fresh }, asked = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of asked) if (Object.hasOwn(found, name)) found[name] = value;
  if (!Object.hasOwn(data.maps, found.map) && !defined.includes(found.map)) found.map = fresh.map;
  if (found.user && !data.users.includes(found.user)) found.user = fresh.user;
  found.head = indexOf(found.head) < 0 ? fresh.head : nameOf(indexOf(found.head));
  if (!views.some((view) => view.key === found.view)) found.view = fresh.view;
  if (!texts.some(([key]) => key === found.text)) found.text = fresh.text;
  if (grid && ![0, ...grid.gammas].includes(+found.gamma)) found.gamma = fresh.gamma;
  if (grid && !grid.ks.includes(+found.k)) found.k = fresh.k;
  const read = views.find((view) => view.key === found.view), length = read ? read.spans.response[1] - read.spans.response[0] : 0;
  if (!(/^\d+$/.test(found.token) && +found.token < length)) found.token = fresh.token;
  if (!document.getElementById(`tab-${found.tab}`)) found.tab = fresh.tab;
  return found;
}

/** A step that Back undoes; of what is dragged or typed, the last one counts. */
function go(change, { replace = false } = {}) {
  state = { ...state, ...change };
  const changed = Object.entries(state).filter(([name, value]) => value !== fresh[name]);
  // Inside a notebook's cell the page has no address of its own.
  try { history[replace ? "replaceState" : "pushState"](null, "", `#${new URLSearchParams(changed)}`); } catch { /* the state is kept here */ }
  draw();
}

addEventListener("popstate", () => { state = read(); draw(); });

// heads

function drawHeatmap() {
  const { mean, half, n, unit } = shown(state.map, state.user), rank = ranks(state.map, state.user);
  const absolute = Float32Array.from(mean, Math.abs).sort();
  const limit = absolute[Math.min(size - 1, Math.floor(0.995 * size))] || 1e-9;
  const rows = (make) => Array.from({ length: data.layers }, (_, layer) =>
    Array.from({ length: data.heads }, (_, head) => make(layer * data.heads + head)));
  const interval = (i) => (half && n > 1 ? `<br>95% interval ${number(mean[i] - half[i])} to ${number(mean[i] + half[i])}` : "");
  const box = (name, color, width) => {
    const at = indexOf(name), x = at % data.heads, y = Math.floor(at / data.heads);
    return { type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color, width } };
  };
  const boxes = data.tops.filter((name) => indexOf(name) >= 0).map((name) => box(name, "black", 1.2));
  const picked = ask ? ask.heads().map((name) => box(name, "#009E73", 2)) : [];
  const dots = state.map === data.main && state.user === EVERYBODY ? data.significant.map(indexOf) : [];
  const clipped = [...mean.keys()].filter((i) => Math.abs(mean[i]) > limit);
  const marks = (cells, marker) => ({
    type: "scatter", mode: "markers", x: cells.map((i) => i % data.heads), y: cells.map((i) => Math.floor(i / data.heads)),
    marker, hoverinfo: "skip", showlegend: false,
  });
  const traces = [{
    type: "heatmap", z: rows((i) => mean[i]), zmid: 0, zmin: -limit, zmax: limit, colorscale: data.colours, xgap: 1, ygap: 1,
    text: rows((i) => `<b>${nameOf(i)}</b><br>${number(mean[i])} ${plain(unit)}${interval(i)}<br>rank ${rank[i]} of ${size}`),
    hovertemplate: "%{text}<extra></extra>",
    colorbar: { title: { text: `${plain(unit)}<br>(ends at \u00b1${limit.toPrecision(2)})` }, thickness: 12 },
  },
  marks(dots, { color: "black", size: 5, line: { color: "white", width: 1 } }),
  marks(clipped, { symbol: "x-thin", size: 7, line: { color: "white", width: 1.5 } })];
  const axis = (text, count) => ({ title: { text }, dtick: count <= 16 ? 1 : 5, range: [-0.5, count - 0.5], zeroline: false, showgrid: false, ticks: "outside", fixedrange: true });
  Plotly.react("heatmap", traces, {
    height: Math.max(360, Math.min(760, 110 + 15 * data.layers)), margin: { l: 52, r: 10, t: 10, b: 44 },
    xaxis: axis("head", data.heads), yaxis: axis("layer", data.layers), shapes: [...boxes, ...picked, box(state.head, "#E69F00", 3)],
    font: { family: "Helvetica, Arial, sans-serif", size: 12 },
  }, PLOT);
  once("click", () => $("heatmap").on("plotly_click", ({ points: [{ x, y }], event }) => {
    const name = nameOf(y * data.heads + x);
    if (ask && event.shiftKey) ask.toggle(name);
    else go({ head: name });
  }));
  const single = state.map === data.main && examples() ? `${n} example${n > 1 ? "s" : ""} of one user` : "Mean of one user's examples";
  const whom = isFamily(state.map) ? "" : state.user ? `${single}: no claim about heads. ` : `Mean of ${n} users. `;
  $("map-note").textContent = `${whom}Black: ${data.outlined}. ` +
    (dots.length ? "Dots: p \u2264 0.05 over users, family-wise over heads. " : "") + (clipped.length ? "\u00d7: beyond the ends of the colours. " : "") +
    (ask ? "Green: the heads that are asked about; Shift-click puts one in or takes it out." : "");
}

function drawDetail() {
  const i = indexOf(state.head), { mean, half, n, unit } = shown(state.map, state.user);
  $("detail-name").textContent = nameOf(i);
  const facts = [[isFamily(state.map) ? words(state.map) : state.map, `${number(mean[i])} ${unit}`]];
  if (half && n > 1) facts.push(["95% interval", `${number(mean[i] - half[i])} to ${number(mean[i] + half[i])}`]);
  facts.push(["rank", `${ranks(state.map, state.user)[i]} of ${size}`]);
  if (state.map === data.main && state.user === EVERYBODY && data.significant.includes(nameOf(i))) facts.push(["population", "p \u2264 0.05, family-wise over heads"]);
  $("detail-facts").replaceChildren(...facts.flatMap(([name, value]) => [explained("dt", name), element("dd", value)]));
  const families = Object.entries(data.families).map(([name, about]) => (about.reason
    ? [words(name), "not shown by this model", ""]
    : [words(name), number(family(name)[i]), `${ranks(name, EVERYBODY)[i]} of ${size}`]));
  const own = Object.keys(data.maps).map((name) => [name, number(shown(name, state.user).mean[i]), `${ranks(name, state.user)[i]} of ${size}`]);
  table($("detail-ranks"), ["map", "score", "rank"], [...own, ...families]);
  drawExamples(i);
}

/** Every head of the map that is shown, a row each, by rank. */
function listed() {
  const { mean, half, n, unit } = shown(state.map, state.user), rank = ranks(state.map, state.user);
  const order = [...rank.keys()].sort((a, b) => rank[a] - rank[b]), bounds = half && n > 1;
  const rows = order.map((i) => [rank[i], nameOf(i), mean[i], bounds ? mean[i] - half[i] : NaN, bounds ? mean[i] + half[i] : NaN,
    ...defined.map((name) => ranks(name, EVERYBODY)[i])]);
  return [["rank", "head", unit, "low", "high", ...defined.map((name) => `rank, ${words(name)}`)], ...rows];
}

let sorted = { column: 0, down: true };

/** The list beside the map: sorted by a column, filtered by a name or a layer. */
function drawList() {
  if (!$("list").open) return;
  const [head, ...rows] = listed(), wanted = $("list-filter").value.trim().toLowerCase(), target = $("list-table");
  const found = rows.filter(([, name]) => !wanted || name.toLowerCase().startsWith(wanted) || (wanted === "outlined" && data.tops.includes(name)));
  const key = (row) => (sorted.column === 1 ? indexOf(row[1]) : row[sorted.column]);
  found.sort((a, b) => (sorted.down ? 1 : -1) * (key(a) - key(b)));
  const shownRows = found.slice(0, MOST_ROWS), text = (value) => (typeof value === "string" || Number.isInteger(value) ? String(value) : number(value));
  table(target, head, shownRows.map((row) => row.map(text)));
  [...target.rows[0].cells].forEach((cell, column) => {
    const press = explained("button", cell.textContent, { type: "button", class: "plain" });
    press.addEventListener("click", () => { sorted = { column, down: sorted.column === column ? !sorted.down : true }; drawList(); });
    if (sorted.column === column) cell.setAttribute("aria-sort", sorted.down ? "ascending" : "descending");
    cell.replaceChildren(press);
  });
  [...target.rows].slice(1).forEach((row, at) => {
    const name = shownRows[at][1], press = element("button", name, { type: "button", class: "plain link" });
    press.addEventListener("click", () => go({ head: name }));
    row.cells[1].replaceChildren(press);
    if (data.tops.includes(name)) row.classList.add("main");
  });
  $("list-note").textContent = `${found.length} of ${size} heads${found.length > MOST_ROWS ? `, the first ${MOST_ROWS} of them` : ""}; "tested" filters those that are tested.`;
}

/** One dot an example, one line a user. */
function drawExamples(i) {
  const target = $("detail-examples");
  if (!examples()) {
    target.replaceChildren(element("p", "There are too many values for a page; HeadScores.load(folder).values holds them.", { class: "hint" }));
    return;
  }
  const at = state.user === EVERYBODY ? data.users.map((_, index) => index) : [data.users.indexOf(state.user)];
  const lines = at.map((user) => rowsOf(user).map((row) => [row, examples()[row * size + i]]));
  const all = lines.flat().map(([, value]) => value), low = Math.min(0, ...all), high = Math.max(0, ...all);
  const step = at.length > 40 ? 4 : 13, width = 430, left = at.length > 40 ? 8 : 130, height = step * at.length + 24;
  const x = (value) => left + 6 + ((width - left - 16) * (value - low)) / (high - low || 1);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const add = (tag, attributes, text) => {
    const found = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
    if (text !== undefined) found.textContent = text;
    svg.append(found);
    return found;
  };
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  walk(svg, `${all.length} examples, from ${number(low)} to ${number(high)}`);
  add("line", { x1: x(0), x2: x(0), y1: 2, y2: height - 20, stroke: "#aaa" });
  lines.forEach((values, line) => {
    const y = 8 + step * line, user = data.users[at[line]];
    if (left > 8) add("text", { x: left - 4, y: y + 4, "text-anchor": "end", "font-size": 10, fill: "#5f6670" }, user.length > 22 ? `${user.slice(0, 21)}\u2026` : user);
    for (const [row, value] of values) {
      const dot = add("circle", { cx: x(value), cy: y, r: step > 4 ? 3.4 : 2, fill: value < 0 ? `rgb(${RED})` : `rgb(${BLUE})`, "fill-opacity": 0.7, class: "example" });
      hint(dot, `${user}\n${data.examples.ids[row]}\n${number(value)} ${data.unit}`);
    }
  });
  for (const value of [low, high]) if (Math.abs(x(value) - x(0)) > 44) add("text", { x: x(value), y: height - 6, "font-size": 10, "text-anchor": value === low ? "start" : "end", fill: "#5f6670" }, number(value, 3));
  add("text", { x: x(0), y: height - 6, "font-size": 10, "text-anchor": "middle", fill: "#5f6670" }, "0");
  target.replaceChildren(svg);
}

/** Whether a head's attention is there for every token of the response. */
const canChoose = (view, row) => Boolean(view.byToken) && row < view.byToken.largest.length;

function drawAttention() {
  const view = views.find((one) => one.key === state.view), target = $("attention");
  if (!view) { target.replaceChildren(element("span", "No attention was kept for this page.")); return; }
  const row = view.heads.indexOf(nameOf(indexOf(state.head))), n = view.pieces.length;
  if (row < 0) { target.replaceChildren(element("span", "Attention of this head was not kept; the page holds that of the best heads of every family.")); $("view-note").textContent = ""; return; }
  const [begin, end] = view.spans.response, chosen = state.token === "" || !canChoose(view, row) ? -1 : +state.token;
  const [values, largest, offset] = chosen < 0
    ? [once(`view|${view.key}`, () => bytes(view.values)), view.largest[row], row * n]
    : [once(`view by token|${view.key}`, () => bytes(view.byToken.values)), view.byToken.largest[row], (row * (end - begin) + chosen) * n];
  const span = (at) => Object.keys(view.spans).find((name) => at >= view.spans[name][0] && at < view.spans[name][1]) || "";
  let inProfile = 0, darkest = 0;
  const weightAt = (at) => (values[offset + at] / 255) * largest;
  target.replaceChildren(...view.pieces.map((piece, at) => {
    const weight = weightAt(at), found = element("span", piece, { class: span(at) });
    if (span(at) === "profile") inProfile += weight;
    darkest = Math.max(darkest, weight);
    found.style.background = behind(Math.sqrt(values[offset + at] / 255));
    hint(found, `${(100 * weight).toFixed(1)}% of the attention\n${span(at) || "chat marks"}`);
    if (span(at) === "response" && canChoose(view, row)) {
      found.classList.add("choice");
      if (at - begin === chosen) found.classList.add("chosen");
      found.addEventListener("click", () => { go({ token: at - begin === chosen ? "" : String(at - begin) }); });
    }
    return found;
  }));
  const whence = chosen < 0 ? "mean over the response" : `where ${JSON.stringify(view.pieces[begin + chosen])} is read`;
  $("view-note").textContent = `${state.head}, ${whence}: ${(100 * inProfile).toFixed(0)}% on the profile (blue line), darkest ${(100 * darkest).toFixed(1)}%` +
    (canChoose(view, row) ? "; click a token of the response (green line) for what it looks at" : "");
  const sum = ([from, to]) => { let found = 0; for (let at = from; at < to; at++) found += weightAt(at); return found; };
  const rows = view.documents.map((at) => [view.pieces.slice(...at).join("").slice(0, 90), `${(100 * sum(at)).toFixed(1)}%`]);
  const others = [["the task", sum(view.spans.task)], ["the response before", sum(view.spans.response)]].map(([name, share]) => [name, `${(100 * share).toFixed(1)}%`]);
  table($("documents"), ["document", "attention"], [...rows, ...others]);
}

/** Log p of each token of the answers, with the profile minus without. */
function drawAnswers() {
  const view = views.find((one) => one.key === state.view), answers = view?.answers ?? [];
  $("answers").previousElementSibling.hidden = !answers.length;
  const largest = Math.max(1e-9, ...answers.flatMap((one) => one.gains.map(Math.abs)));
  $("answers").replaceChildren(...answers.flatMap(({ pieces, gains }, place) => {
    const mean = gains.reduce((sum, gain) => sum + gain, 0) / gains.length, text = walk(element("p", undefined, { class: "tokens" }), "tokens of an answer");
    text.append(...pieces.map((piece, at) => {
      const found = element("span", piece), gain = gains[at];
      found.style.background = behind(gain / largest);
      hint(found, `log p with the profile \u2212 without ${number(gain, 3)}`);
      return found;
    }));
    const whose = place ? "rejected" : "the user's own";
    return [element("p", `${whose}: ${number(mean, 3)} nats per token; blue tokens are likelier with the profile`, { class: "hint" }), text];
  }));
}

function press(event) {
  const move = { ArrowUp: data.heads, ArrowDown: -data.heads, ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!move) return;
  event.preventDefault();
  const next = indexOf(state.head) + move;
  if (next >= 0 && next < size) go({ head: nameOf(next) }, { replace: true });
}

// figures that were drawn beforehand

function plotted(box, { data: traces, layout }) { Plotly.react(box, traces, { ...layout, autosize: true }, PLOT); }

function drawFigures(tab) {
  const panel = $(tab === "texts" ? "texts-figures" : tab), figures = data.figures[tab], names = Object.keys(figures);
  panel.replaceChildren();
  if (tab === "ablation") drawCost(panel);
  if (tab === "mechanism") panel.append(element("p", "Held-out examples; intervals are 95% over users, squares random other heads of the same layer.", { class: "hint" }));
  if (!names.length) {
    if (!panel.children.length) panel.append(element("p", "Nothing of this kind was measured for this page.", { class: "hint" }));
    return;
  }
  const chosen = tab in state && names.includes(state[tab]) ? state[tab] : names[0];
  const select = element("select", undefined, { "aria-label": "figure" }), box = element("div", undefined, { class: "figure" });
  options(select, names.map((name) => [name, words(name)]));
  select.value = chosen;
  const plot = (name) => { plotted(box, figures[name]); };
  select.addEventListener("change", () => { if (tab in fresh) go({ [tab]: select.value }); else plot(select.value); });
  const controls = element("div", undefined, { class: "controls" });
  controls.append(select);
  panel.append(controls, box, take.figure(box, () => select.value, () => take.traces(box)));
  plot(chosen);
}

function drawCost(panel) {
  if (!data.cost.length) return;
  const found = element("table");
  table(found, ["ablated", "measure", "nats per token", "95% interval over users"], data.cost.map((row) =>
    [row.ablated, row.measure, number(row.mean ?? NaN, 3), row.low === null ? "\u2013" : `${number(row.low, 3)} to ${number(row.high, 3)}`]));
  [...found.rows].slice(1).forEach((row, index) => { if (data.cost[index].measure .startsWith("gain_removed")) row.classList.add("main"); });
  const rows = () => [["ablated", "measure", "mean", "low", "high"], ...data.cost.map((row) => [row.ablated, row.measure, row.mean, row.low, row.high])];
  panel.append(found, take.table(() => "ablation", rows), element("p", "Held-out examples. Gain: NLL without the profile minus NLL with it; gain_other: NLL with another user's profile minus NLL with the own. gain_removed: the gain that the ablation removes. task_cost, neutral_cost: what it costs the same task without a profile, and text that is nobody's. necessity_other: what is lost when the heads' outputs come from a run with another user's profile; sufficiency_other: what that run gets back with the heads' own outputs. Random sets hold other heads of the same layers; the interval of a difference is over users and random sets.", { class: "hint" }));
}

// texts

function tokens(target, one, largest) {
  target.replaceChildren(...one.pieces.map((piece, at) => {
    const found = element("span", piece), shift = one.shifts[at];
    if (shift === null) return found;
    found.style.background = behind(shift / largest);
    const moved = (one.alternatives[at] || []).map(([other, change]) => `${change > 0 ? "+" : "\u2212"}${Math.abs(change).toFixed(3)}  ${JSON.stringify(other)}`);
    if (one.gamma) hint(found, [`log p steered \u2212 full ${number(shift, 3)}`, `KL ${number(one.kl[at] ?? NaN, 3)} nats`, ...moved].join("\n"));
    return found;
  }));
}

const scores = (one) => Object.entries(one.scores).map(([name, value]) => `${name} ${number(value, 3)}`).join(", ");

/** The last live answer, with what it was asked for; null where the grid is shown. */
let live = null, writing = null;

/** Where the selector and the sliders stand; an answer belongs to the place that it was asked at. */
const place = () => JSON.stringify([state.text, state.gamma, state.k]);

function drawTexts() {
  if (!grid) return;
  if (live && live.place !== place()) {
    if (writing) writing.abort();
    live = null;
  }
  const gamma = +state.gamma, k = +state.k;
  const find = (g) => grid.texts.find((one) => one.key === state.text && one.gamma === g && (one.k === k || !g));
  const plain = find(0), steered = find(gamma);
  const largest = Math.max(1e-9, ...grid.texts.filter((one) => one.key === state.text).flatMap((one) => one.shifts.map((shift) => Math.abs(shift ?? 0))));
  $("text-own").textContent = grid.references[state.text];
  tokens($("text-plain"), plain, largest);
  $("plain-scores").textContent = scores(plain);
  const shownNow = live ?? { gamma, k, heads: gamma ? steered.heads : "", one: steered, said: scores(steered) };
  if (shownNow.one) tokens($("text-steered"), shownNow.one, live ? Math.max(1e-9, ...live.one.shifts.map((shift) => Math.abs(shift ?? 0))) : largest);
  else $("text-steered").textContent = shownNow.text;
  $("steered-scores").textContent = shownNow.said;
  $("steered-title").textContent = `${grid.rule}, \u03b3 = ${shownNow.gamma}, K = ${shownNow.k}`;
  $("text-note").textContent = `Blue tokens were made likelier by steering, red ones less likely; hover for what moved.${shownNow.heads ? ` Heads: ${shownNow.heads}` : ""}`;
  const most = data.live?.most[texts.find(([key]) => key === state.text)[1].user];
  if (data.live) { $("k-free").max = most; if (+$("k-free").value > most) $("k-free").value = most; }
  $("text-take").replaceChildren(...take.lines(live ?? {}));
  $("write").disabled = writing !== null || most === 0; $("cancel").disabled = writing === null; $("spinner").hidden = writing === null;
}

/** What a server answers line by line, each a JSON object; its refusals are thrown. */
async function* lines(reply) {
  const thrown = ({ error, field }) => Object.assign(new Error(error), { field });
  if (!reply.ok) throw thrown(await reply.json());
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", done = false; !done;) {
    const part = await reader.read();
    done = part.done;
    const texts = (rest + (part.value ?? "")).split("\n");
    rest = texts.pop();
    for (const line of texts.map((text) => JSON.parse(text))) {
      if (line.error) throw thrown(line);
      yield line;
    }
  }
}

async function write() {
  if (!["gamma-free", "k-free"].every((id) => $(id).reportValidity())) return;
  const asked = texts.find(([key]) => key === state.text)[1], control = new AbortController();
  const answer = { place: place(), gamma: +$("gamma-free").value, k: +$("k-free").value, heads: "", text: "", one: null, python: "", command: "", said: "" };
  live = answer; writing = control;
  drawTexts();
  try {
    const reply = await fetch("steer", {
      method: "POST", headers: { "Content-Type": "application/json" }, signal: control.signal,
      body: JSON.stringify({ user: asked.user, example: asked.example, gamma: answer.gamma, k: answer.k }),
    });
    for await (const line of lines(reply)) {
      if (line.waiting !== undefined) answer.said = line.waiting ? `waiting, ${line.waiting} before this one` : "";
      if (line.heads !== undefined) Object.assign(answer, { heads: line.heads, said: "" });
      if (line.text !== undefined) answer.text += line.text;
      if (line.done) Object.assign(answer, { one: line.done, python: line.python, command: line.command, said: scores(line.done) });
      if (live === answer) drawTexts();
    }
  } catch (error) {
    answer.said = error.name === "AbortError" ? "cancelled" : `error: ${error.message}`;
  } finally {
    if (writing === control) writing = null;
    drawTexts();
  }
}

// everything

const take = globalThis.taking({ element, nameOfPage: document.title });
const topOf = (name, k) => { const rank = ranks(name, EVERYBODY); return [...rank.keys()].sort((a, b) => rank[a] - rank[b]).slice(0, k).map(nameOf); };
const ask = data.live ? globalThis.asking({ data, $, element, options, grouped, table, number, tokens, lines, indexOf, nameOf, topOf, stateOf: () => state, go, take, walk }) : null;
const describing = globalThis.describing({
  data, $, element, take, lines, stateOf: () => state, userOf: () => views.find((one) => one.key === state.view)?.user ?? "", plotted,
});
const onMap = () => `${state.map} ${state.user || "all users"}`;
$("map-take").append(take.figure($("heatmap"), onMap, listed),
  take.copy("Copy heads as Python", () => `dps.HeadSet.parse(${JSON.stringify(data.tops.join(","))})`), take.copy("Copy link", () => location.href));
$("list-take").append(take.table(() => `${onMap()} heads`, listed));
$("list").addEventListener("toggle", drawList);
$("list-filter").addEventListener("input", drawList);
const drawn = new Map();
function drawHeads() { drawHeatmap(); drawDetail(); drawList(); describing.draw(); drawAttention(); drawAnswers(); }

function draw() {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const name = tab.id.slice(4), selected = name === state.tab;
    tab.setAttribute("aria-selected", selected);
    tab.tabIndex = selected ? 0 : -1;
    $(name).hidden = !selected;
  }
  $("user").value = state.user; $("map").value = state.map; $("head").value = state.head;
  $("view").value = state.view; $("text").value = state.text;
  if (grid) {
    const gammas = [0, ...grid.gammas].sort((a, b) => a - b);
    $("gamma").value = gammas.indexOf(+state.gamma); $("gamma-value").textContent = state.gamma;
    $("k").value = grid.ks.indexOf(+state.k); $("k-value").textContent = state.k;
  }
  if (state.tab === "heads") drawHeads();
  if (state.tab === "texts") drawTexts();
  if (ask) ask.draw();
  const chosen = state[state.tab] ?? "";
  if (state.tab in data.figures && drawn.get(state.tab) !== chosen) { drawn.set(state.tab, chosen); drawFigures(state.tab); }
}

// Paper has no tabs: every panel is drawn.
addEventListener("beforeprint", () => {
  for (const panel of document.querySelectorAll("[role=tabpanel]")) panel.hidden = false;
  drawHeads();
  for (const tab of Object.keys(data.figures)) if ($(tab)) { drawn.set(tab, state[tab] ?? ""); drawFigures(tab); }
  drawTexts();
});
addEventListener("afterprint", draw);

/** The selector with the users whose names hold a text; the chosen one stays. */
function offer(wanted) {
  const found = data.users.filter((user) => user.toLowerCase().includes(wanted.trim().toLowerCase()));
  const shown = state.user === EVERYBODY || found.includes(state.user) ? found : [state.user, ...found];
  $("user").replaceChildren(element("option", `mean of ${data.users.length} users`, { value: EVERYBODY }), ...grouped(shown));
  $("user").value = state.user;
  return found;
}
offer("");
if (data.users.length > MANY_USERS) {
  $("finding").hidden = false;
  $("find-user").addEventListener("input", (event) => {
    const found = offer(event.target.value);
    event.target.setCustomValidity(found.length ? "" : "no user of this name");
  });
  $("find-user").addEventListener("keydown", (event) => {
    const found = event.key === "Enter" ? offer(event.target.value) : [];
    if (found.length) { $("user").value = found[0]; $("user").dispatchEvent(new Event("change")); }
  });
}
options($("map"), [...Object.keys(data.maps), ...defined].map((name) => [name, isFamily(name) ? `family: ${words(name)}` : name]));
options($("view"), views.map((view) => [view.key, `${view.user}: ${view.example}`]));
options($("text"), texts.map(([key, one]) => [key, `${one.user}: ${one.example}`]));
if (!grid) for (const part of document.querySelectorAll("#texts > :not(#texts-figures)")) part.hidden = true;
if (grid) {
  for (const [id, values] of [["gamma", [0, ...grid.gammas].sort((a, b) => a - b)], ["k", grid.ks]]) {
    Object.assign($(id), { min: 0, max: values.length - 1, step: 1 });
    $(id).addEventListener("input", (event) => go({ [id]: String(values[event.target.value]) }, { replace: true }));
  }
  if (data.live) {
    const free = (id, text, attributes) => { const label = element("label", `${text} `); label.append(element("input", undefined, { id, type: "number", required: "", ...attributes })); return label; };
    $("live").prepend(free("gamma-free", "\u03b3", { min: -1, max: 1000, step: "any", value: state.gamma }), " ", free("k-free", "K", { min: 1, step: 1, value: state.k }), " ");
    $("live").hidden = false;
    $("write").addEventListener("click", write);
    $("cancel").addEventListener("click", () => writing && writing.abort());
  }
}
$("user").addEventListener("change", (event) => {
  const user = event.target.value, view = views.find((one) => one.user === user), text = texts.find(([, one]) => one.user === user);
  go({ user, ...(view ? { view: view.key, token: "" } : {}), ...(text ? { text: text[0] } : {}) });
});
$("map").addEventListener("change", (event) => go({ map: event.target.value }));
$("view").addEventListener("change", (event) => go({ view: event.target.value, token: "" }));
$("text").addEventListener("change", (event) => go({ text: event.target.value }));
$("head").addEventListener("change", (event) => {
  const at = indexOf(event.target.value);
  event.target.setCustomValidity(at < 0 ? `Heads are L0H0 to ${nameOf(size - 1)}` : "");
  if (at < 0) event.target.reportValidity();
  else go({ head: nameOf(at) });
});
$("heatmap").addEventListener("keydown", press);
for (const [id, label] of [["attention", "tokens of the prompt"], ["text-plain", "tokens of the plain text"], ["text-steered", "tokens of the steered text"]]) walk($(id), label);
document.querySelector("[role=tablist]").addEventListener("click", (event) => { if (event.target.role === "tab") go({ tab: event.target.id.slice(4) }); });
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const tabs = [...document.querySelectorAll("[role=tab]")], at = tabs.findIndex((tab) => tab.id === `tab-${state.tab}`);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (to === undefined) return;
  const next = tabs[(to + tabs.length) % tabs.length];
  go({ tab: next.id.slice(4) });
  next.focus();
});
draw();
})();
