// A click on a column's header sorts the table by it, a second click the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((header, column) => {
    header.tabIndex = 0;
    const sort = () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const each of table.querySelectorAll("th")) each.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = (row) => row.cells[column].textContent;
      const number = (row) => parseFloat(text(row).replaceAll(",", ""));
      const compare = (a, b) => {
        const [x, y] = [number(a), number(b)];
        if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;  // what is missing comes last, both ways
        return (down ? -1 : 1) * (isNaN(x) ? text(a).localeCompare(text(b)) : x - y);
      };
      body.append(...[...body.rows].sort(compare));
    };
    header.addEventListener("click", sort);
    header.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
}
