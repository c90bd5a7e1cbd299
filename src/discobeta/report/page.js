// A click on the head of a column sorts the rows by it, a second one the other way round. Without this all is there too.
"use strict";

function value(cell) {
  const text = cell ? cell.textContent.trim() : "";
  const found = /^[+\u2212-]?[\d.,]*\d(?:e[+-]?\d+)?/.exec(text);
  return { text, number: found ? Number(found[0].replaceAll(",", "").replace("\u2212", "-")) : NaN };
}

function compare(one, other, sign) {
  const numbers = [Number.isNaN(one.number), Number.isNaN(other.number)];
  if (numbers[0] !== numbers[1]) return numbers[0] ? 1 : -1; // what is not there stands last, either way
  if (!numbers[0] && one.number !== other.number) return sign * (one.number - other.number);
  return sign * one.text.localeCompare(other.text, "en", { numeric: true });
}

function sort(table, place, sign) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => [value(row.cells[place]), row]);
  rows.sort((one, other) => compare(one[0], other[0], sign));
  body.append(...rows.map(([, row]) => row));
  table.classList.add("sorted");
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      sort(table, place, sign);
    });
  });
}

// On paper what is folded is open.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open]):not(.unprinted)")) {
    part.open = true;
    part.dataset.opened = "";
  }
});
addEventListener("afterprint", () => {
  for (const part of document.querySelectorAll("details[data-opened]")) {
    part.open = false;
    delete part.dataset.opened;
  }
});
