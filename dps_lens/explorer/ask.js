"use strict";

/** The tab where a live page is asked. It is given the page's tools, and gives back what the page draws and calls. */
globalThis.asking = ({ data, $, element, options, grouped, table, number, tokens, lines, indexOf, nameOf, topOf, stateOf, go, take, walk }) => {
  const start = data.live, [shown] = start.examples, PASTED = "";
  const fresh = {
    user: shown.user, prompt: shown.prompt, text: shown.text, documents: "", heads: data.tops.join(","),
    ablation: start.ablations[0], rule: start.rules[0], gamma: "1", length: String(start.length),
  };
  const field = (name) => $(`ask-${name}`);
  const answers = [];
  let running = null, count = 0;

  // what is asked, and the named sets of heads, kept in the address

  /** Texts by name that the address holds; whatever else stands there is not ours. */
  function kept(name) {
    try {
      return Object.fromEntries(Object.entries(JSON.parse(stateOf()[name] || "{}")).filter(([, value]) => typeof value === "string"));
    } catch {
      return {};
    }
  }
  const form = () => ({ ...fresh, ...Object.fromEntries(Object.entries(kept("ask")).filter(([name]) => Object.hasOwn(fresh, name))) });
  const change = (part) => go({ ask: JSON.stringify({ ...form(), ...part }) }, { replace: true });
  const headsOf = (names) => names.split(/[,\s]+/).filter((name) => indexOf(name) >= 0).map((name) => nameOf(indexOf(name)));
  const sets = () => ({
    "outlined heads": data.tops.join(","),
    ...Object.fromEntries(Object.keys(data.families).filter((name) => !data.families[name].reason)
      .map((name) => [`top ${data.tops.length} of ${name.replaceAll("_", " ")}`, topOf(name, data.tops.length).join(",")])),
    ...kept("sets"),
  });

  /** Put a head into the set that is asked about, or take it out. */
  function toggle(name) {
    const heads = headsOf(form().heads);
    change({ heads: (heads.includes(name) ? heads.filter((one) => one !== name) : [...heads, name]).join(",") });
  }

  // asking

  function refuse(error) {
    const known = error.field && field(error.field);
    const place = known ? $(`ask-refused-${error.field}`) : $("ask-refused");
    place.textContent = error.message;
    if (known) { known.setAttribute("aria-invalid", "true"); known.focus(); }
  }

  function clear() {
    for (const place of document.querySelectorAll("#ask .refused")) place.textContent = "";
    for (const one of document.querySelectorAll("#ask [aria-invalid]")) one.removeAttribute("aria-invalid");
  }

  async function ask(kind) {
    clear();
    const asked = form(), control = new AbortController();
    const answer = { number: ++count, kind, asked, control, rows: [], next: [], text: "", one: null, python: "", command: "", said: "asked", pinned: false };
    if (running) running.abort();
    running = control;
    answers.unshift(answer);
    drawAnswers();
    try {
      const body = { ...asked, gamma: typed(asked.gamma), length: typed(asked.length) };
      const reply = await fetch(kind === "write" ? "write" : "ask", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: control.signal,
      });
      for await (const line of lines(reply)) {
        if (line.waiting !== undefined) answer.said = line.waiting ? `waiting, ${line.waiting} before this one` : "reading the prompt";
        if (line.text !== undefined) { answer.text += line.text; answer.said = "writing"; }
        if (line.next) Object.assign(answer, { next: line.next, said: answer.asked.text.trim() ? "measuring" : "" });
        if (line.rows) Object.assign(answer, { rows: line.rows, said: "" });
        if (line.done) Object.assign(answer, { one: { ...line.done, gamma: Number(asked.gamma) }, said: "" });
        if (line.python) Object.assign(answer, { python: line.python, command: line.command });
        drawAnswers();
      }
    } catch (error) {
      if (error.name === "AbortError") answer.said = "cancelled";
      else { drop(answer); refuse(error); }
    } finally {
      if (running === control) running = null;
      drawAnswers();
    }
  }

  /** What was typed, as a number where it is one. */
  const typed = (text) => (text.trim() === "" || Number.isNaN(Number(text)) ? text : Number(text));

  /** Take an answer away, and end what it is waiting for. */
  function drop(answer) {
    answer.control.abort();
    const at = answers.indexOf(answer);
    if (at >= 0) answers.splice(at, 1);
    drawAnswers();
  }

  // What is asked about is read while the question is looked at.
  let prepared = "", timer = 0, preparing = new AbortController();
  function prepare() {
    const { user, prompt, text, documents, ablation } = form(), about = { user, prompt, text, documents, ablation };
    const whole = prompt.trim() && text.trim() && (user !== PASTED || documents.trim());
    clearTimeout(timer);
    if (stateOf().tab !== "ask" || !whole || JSON.stringify(about) === prepared) return;
    timer = setTimeout(async () => {
      prepared = JSON.stringify(about);
      preparing.abort();
      preparing = new AbortController();
      const body = JSON.stringify({ ...about, heads: data.tops.join(",") });
      try {
        const reply = await fetch("prepare", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal: preparing.signal });
        for await (const line of lines(reply)) void line;
      } catch { prepared = ""; } // whoever asks is told
    }, 300);
  }

  // answers

  const about = (answer) => (answer.kind === "write"
    ? `${answer.asked.rule}, \u03b3 = ${answer.asked.gamma}` : `${answer.asked.ablation} ablation`);
  const title = (answer) => `${answer.number}. ${about(answer)}, ${headsOf(answer.asked.heads).length} heads`;
  const value = (row) => (row.value !== undefined ? row.value : row.edited - row.full);

  function card(answer) {
    const found = element("article", undefined, { class: "answer", id: `answer-${answer.number}` });
    const whose = answer.asked.user === PASTED ? "pasted documents" : `profile of ${answer.asked.user}`;
    found.append(element("h4", title(answer)), element("p", `${headsOf(answer.asked.heads).join(",")}; ${whose}; ${answer.asked.prompt}`, { class: "hint asked" }));
    if (answer.said) found.append(element("p", answer.said, { class: "hint", role: "status" }));
    if (answer.rows.length) {
      const measures = element("table");
      table(measures, ["nats per token", "the model", "heads ablated", "change"], answer.rows.map((row) => (row.value !== undefined
        ? [row.measure, "", "", number(row.value, 3)] : [row.measure, number(row.full, 3), number(row.edited, 3), number(value(row), 3)])));
      found.append(measures);
    }
    if (answer.next.length) {
      const next = element("table");
      table(next, ["next token", "the model", "heads ablated"], answer.next.map(([piece, full, edited]) => [JSON.stringify(piece), number(full, 3), number(edited, 3)]));
      found.append(next);
    }
    if (answer.text) {
      const text = walk(element("p", answer.text, { class: "tokens" }), "tokens of the text");
      if (answer.one) tokens(text, answer.one, Math.max(1e-9, ...answer.one.shifts.map((shift) => Math.abs(shift ?? 0))));
      found.append(text);
    }
    const controls = element("div", undefined, { class: "controls" });
    controls.append(take.button(answer.pinned ? "Unpin" : "Pin", () => { pin(answer); }),
      take.button("Back into the form", () => { change(answer.asked); }));
    controls.append(...take.lines(answer));
    if (answer.text) controls.append(take.copy("Copy text", () => answer.text));
    controls.append(take.button("Remove", () => { drop(answer); }));
    found.append(controls);
    if (answer.python) {
      const code = element("details");
      code.open = answer.open ?? false;
      code.addEventListener("toggle", () => { answer.open = code.open; });
      code.append(element("summary", "As code"), element("pre", answer.python, { tabindex: "0" }));
      if (answer.command) code.append(element("pre", answer.command, { tabindex: "0", class: "command" }));
      found.append(code);
    }
    return found;
  }

  /** At most two are pinned: a third takes the place of the older one. */
  function pin(answer) {
    answer.pinned = !answer.pinned;
    const others = answers.filter((one) => one.pinned && one !== answer);
    if (answer.pinned && others.length > 1) others.reduce((old, one) => (one.number < old.number ? one : old)).pinned = false;
    drawAnswers();
    $(`answer-${answer.number}`).querySelector("button").focus();
  }

  /** Pieces of a text that are not in the longest common part with another. */
  function differing(ours, theirs) {
    const length = Array.from({ length: ours.length + 1 }, () => new Uint16Array(theirs.length + 1));
    for (let i = ours.length - 1; i >= 0; i--) {
      for (let j = theirs.length - 1; j >= 0; j--) length[i][j] = ours[i] === theirs[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
    const found = ours.map(() => true);
    for (let i = 0, j = 0; i < ours.length && j < theirs.length;) {
      if (ours[i] === theirs[j]) { found[i] = false; i++; j++; } else if (length[i + 1][j] >= length[i][j + 1]) i++;
      else j++;
    }
    return found;
  }

  function comparison([one, other]) {
    const found = element("section", undefined, { class: "answer", id: "ask-pinned" });
    found.append(element("h4", `${title(one)} beside ${title(other)}`));
    const measured = one.rows.filter((row) => other.rows.some((also) => also.measure === row.measure));
    if (measured.length) {
      const measures = element("table");
      table(measures, ["change by ablation, nats per token", `${one.number}`, `${other.number}`, `${other.number} \u2212 ${one.number}`], measured.map((row) => {
        const also = other.rows.find((theirs) => theirs.measure === row.measure);
        return [row.measure, number(value(row), 3), number(value(also), 3), number(value(also) - value(row), 3)];
      }));
      found.append(measures);
    }
    if (one.one && other.one) {
      const both = element("div", undefined, { class: "pair" });
      for (const [ours, theirs] of [[one, other], [other, one]]) {
        const text = element("p", undefined, { class: "tokens" }), marks = differing(ours.one.pieces, theirs.one.pieces);
        text.append(...ours.one.pieces.map((piece, at) => element(marks[at] ? "mark" : "span", piece)));
        both.append(text);
      }
      found.append(both);
    }
    if (!measured.length && !(one.one && other.one)) found.append(element("p", "One was measured and the other written; pin two of a kind.", { class: "hint" }));
    return found;
  }

  // the tab

  function draw() {
    const asked = form(), named = sets();
    for (const name of Object.keys(fresh)) if (field(name) !== document.activeElement || field(name).value !== asked[name]) field(name).value = asked[name];
    field("documents").parentElement.hidden = asked.user !== PASTED;
    const same = start.examples.find((one) => one.user === asked.user && one.prompt === asked.prompt && one.text === asked.text);
    field("example").value = same ? same.key : "";
    const names = Object.keys(named);
    options(field("set"), [["", "a set \u2026"], ...names.map((name) => [name, name])]);
    field("set").value = names.find((name) => named[name] === asked.heads) ?? "";
    const heads = headsOf(asked.heads);
    field("count").textContent = `${heads.length} heads`;
    prepare();
    $("pick").textContent = `${heads.includes(stateOf().head) ? "Take out of" : "Put into"} the heads that are asked about`;
  }

  /** Only where an answer changed: what is read there, opened or focused stays while the form is filled. */
  function drawAnswers() {
    const pinned = answers.filter((one) => one.pinned).sort((a, b) => a.number - b.number);
    field("cancel").disabled = running === null;
    field("spinner").hidden = running === null;
    field("undo").disabled = !answers.length;
    field("status").textContent = answers.length ? `${title(answers[0])}: ${answers[0].said || "answered"}` : "";
    field("answers").replaceChildren(...(pinned.length === 2 ? [comparison(pinned)] : []), ...answers.map(card));
    if (!answers.length) field("answers").append(element("p", "Measure: what the model loses without these heads. Write: a text steered with them.", { class: "hint" }));
  }

  field("user").replaceChildren(...grouped(start.users), element("option", "pasted documents", { value: PASTED }));
  options(field("example"), [["", "your own question"], ...start.examples.map((one) => [one.key, `${one.user}: ${one.example}`])]);
  for (const name of ["ablation", "rule"]) options(field(name), start[`${name}s`].map((one) => [one, one]));
  for (const name of Object.keys(fresh)) field(name).addEventListener(field(name).tagName === "SELECT" ? "change" : "input", (event) => { change({ [name]: event.target.value }); });
  field("example").addEventListener("change", (event) => {
    const one = start.examples.find(({ key }) => key === event.target.value);
    change(one ? { user: one.user, prompt: one.prompt, text: one.text } : { prompt: "", text: "" });
  });
  field("set").addEventListener("change", (event) => { if (event.target.value) change({ heads: sets()[event.target.value] }); });
  field("name").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); keep(); } });
  function keep() {
    const name = field("name").value.trim();
    if (name) go({ sets: JSON.stringify({ ...kept("sets"), [name]: form().heads }) });
  }
  field("keep").addEventListener("click", keep);
  field("measure").addEventListener("click", () => { ask("measure"); });
  field("write").addEventListener("click", () => { ask("write"); });
  field("cancel").addEventListener("click", () => running && running.abort());
  field("undo").addEventListener("click", () => { const [last] = answers; drop(last); change(last.asked); });
  $("pick").addEventListener("click", () => { toggle(stateOf().head); });
  $("pick").hidden = false;
  drawAnswers();
  return { draw, toggle, heads: () => headsOf(form().heads) };
};
