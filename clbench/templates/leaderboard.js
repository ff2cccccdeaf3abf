"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Without this script everything is open and unsorted: nothing is out of reach.
  for (const button of all(".open")) {
    const detail = document.getElementById(button.getAttribute("aria-controls"));
    const show = (open) => {
      detail.hidden = !open;
      button.setAttribute("aria-expanded", String(open));
    };
    show(false);
    button.addEventListener("click", () => show(detail.hidden));
  }

  const key = (entry, column) => {
    const cell = entry.rows[0].cells[column];
    const text = cell.dataset.key;
    if (text === undefined) return null;
    return cell.dataset.kind === "number" ? Number(text) : text;
  };
  const compare = (a, b) =>
    typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });

  const sort = (table, header) => {
    const column = header.cellIndex;
    const numbers = header.dataset.kind === "number";
    const now = header.getAttribute("aria-sort");
    const first = numbers && column > 0 ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = now === first ? other : first;
    for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const entries = [...table.tBodies].map((entry) => [entry, key(entry, column)]);
    // What has no value comes last in both directions.
    entries.sort(([, a], [, b]) =>
      a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
    table.append(...entries.map(([entry]) => entry));
  };
  for (const table of all("table.board")) {
    for (const header of table.tHead.rows[0].cells) {
      header.querySelector("button").addEventListener("click", () => sort(table, header));
    }
  }

  const words = document.getElementById("words");
  const marks = all(".filters [data-mark]");
  const count = document.getElementById("count");
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const needed = marks.filter((mark) => mark.checked).map((mark) => mark.dataset.mark);
    let shown = 0;
    let total = 0;
    for (const section of all("section.board")) {
      let here = 0;
      for (const entry of all("table.board > tbody", section)) {
        const text = entry.dataset.text.toLowerCase();
        const has = entry.dataset.marks.split(" ");
        const fits = wanted.every((w) => text.includes(w)) && needed.every((m) => has.includes(m));
        entry.hidden = !fits;
        here += fits;
        total += 1;
      }
      section.hidden = here === 0;
      shown += here;
    }
    const noun = total === 1 ? "row" : "rows";
    count.textContent = shown === total ? `${total} ${noun}` : `${shown} of ${total} ${noun}`;
  };
  words.addEventListener("input", filter);
  for (const mark of marks) mark.addEventListener("change", filter);
  document.querySelector(".filters").hidden = false;
  filter();
})();
