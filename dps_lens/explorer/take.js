"use strict";

/** What can be taken from the page: figures as SVG and PNG, numbers as CSV, text for the clipboard. */
globalThis.taking = ({ element, nameOfPage }) => {
  const file = (name, kind) => `${[nameOfPage, name].join(" ").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").toLowerCase()}.${kind}`;

  function button(text, act) {
    const found = element("button", text, { type: "button" });
    found.addEventListener("click", act);
    return found;
  }

  function save(name, text) {
    const link = element("a", undefined, { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const cell = (value) => {
    let text = value === null || value === undefined || Number.isNaN(value) ? "" : String(value);
    // A spreadsheet would take such a name for a formula.
    if (typeof value === "string" && /^[=+@\t\r]/.test(text)) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = ([head, ...rows]) => [head, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";

  /** A button that puts a text on the clipboard, and says so. */
  const copy = (label, text) => button(label, async ({ target }) => {
    try { await navigator.clipboard.writeText(text()); target.textContent = "Copied"; } catch { target.textContent = "Cannot copy here"; }
    setTimeout(() => { target.textContent = label; }, 1500);
  });

  /** Buttons of the lines that answer the same. */
  const lines = ({ python, command }) => [...(python ? [copy("Copy Python", () => python)] : []), ...(command ? [copy("Copy command", () => command)] : [])];

  /** A button that saves rows, the first of which names the columns. */
  const table = (name, rows) => button("CSV", () => save(file(name(), "csv"), csv(rows())));

  const image = (box, name, format) => button(format.toUpperCase(), () => {
    const { width, height } = box.getBoundingClientRect();
    Plotly.downloadImage(box, { format, filename: file(name(), format).slice(0, -format.length - 1), width, height, scale: format === "png" ? 3 : 1 });
  });

  /** Buttons of one figure. */
  function figure(box, name, rows) {
    const found = element("div", undefined, { class: "take" });
    found.append(image(box, name, "svg"), image(box, name, "png"), table(name, rows));
    return found;
  }

  /** What the traces of a figure hold, a row a point. */
  function traces(box) {
    const rows = [["trace", "x", "y", "z", "low", "high"]];
    // Plotly has read the arrays of these, which a figure may hold packed.
    for (const { name, type, x, y, z, error_x: across, error_y: up } of box._fullData) {
      const label = name ?? type ?? "";
      if (z) { z.forEach((line, i) => [...line].forEach((value, j) => rows.push([label, x ? x[j] : j, y ? y[i] : i, value]))); continue; }
      const spread = across?.array ? [x, across] : up?.array ? [y, up] : null;
      for (let i = 0; i < (x ?? y ?? []).length; i++) {
        const ends = spread ? [spread[0][i] - (spread[1].arrayminus ?? spread[1].array)[i], spread[0][i] + spread[1].array[i]] : [];
        rows.push([label, x?.[i], y?.[i], "", ...ends]);
      }
    }
    return rows;
  }

  return { button, copy, lines, table, figure, traces };
};
