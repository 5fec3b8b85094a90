"use strict";

/** What the head that is shown does: a dossier that the page holds, or one that a live page makes of the shown example. */
globalThis.describing = ({ data, $, element, take, lines, stateOf, userOf, plotted }) => {
  const made = new Map();
  let running = false, drawn = null;
  const key = () => JSON.stringify([stateOf().head, userOf()]);
  const held = () => data.figures.mechanism?.[stateOf().head];

  async function describe() {
    const at = key(), found = { said: "asked", figure: null };
    running = true;
    made.set(at, found);
    draw();
    try {
      const reply = await fetch("describe", {
        method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ head: stateOf().head, user: userOf() }),
      });
      for await (const line of lines(reply)) {
        if (line.waiting !== undefined) found.said = line.waiting ? `waiting, ${line.waiting} before this one` : "measuring";
        if (line.figure) Object.assign(found, line, { said: "" });
        draw();
      }
    } catch (error) {
      found.said = error.message;
    } finally {
      running = false;
      draw();
    }
  }

  /** What is said where there is no figure, or above it. */
  function said(found) {
    if (found) return found.said || `In the newest example of ${userOf()}, which chose no head; squares are random other heads of the layer.`;
    if (held()) return "Held-out examples; intervals are 95% over users, squares random other heads of the same layer.";
    if (data.live) return "";
    const name = stateOf().head;
    return `Not in this page; it is, after: dps-lens describe ${name} --out runs/${name}, with this run's --model and --users, and dps-lens report RUN --with runs/${name}`;
  }

  function draw() {
    if ($("heads").hidden) return; // plotly would not know the width
    const found = made.get(key()), figure = found?.figure ?? held() ?? null;
    $("describe").disabled = running;
    $("describe").hidden = !data.live || Boolean(found?.figure);
    $("dossier-said").textContent = said(found);
    if (figure === drawn) return;
    drawn = figure;
    $("dossier").hidden = !figure;
    $("dossier-take").replaceChildren(...(figure ? [take.figure($("dossier"), () => `what ${stateOf().head} does`, () => take.traces($("dossier"))), ...take.lines(found ?? {})] : []));
    if (figure) plotted($("dossier"), figure);
  }

  $("describe").addEventListener("click", describe);
  return { draw };
};
