// Without this script the page lacks the buttons and nothing else.
(() => {
  const text = (cell) => cell.innerText.replace(/\s+/g, " ").trim();
  const tsv = (table) => [...table.rows].map((row) => [...row.cells].map(text).join("\t")).join("\n");
  const select = (table) => {
    const range = document.createRange();
    range.selectNodeContents(table);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
  };
  for (const table of document.querySelectorAll("table")) {
    const button = document.createElement("button");
    const name = "Copy the table (TSV)";
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", async () => {
      let done = "Copied";
      try {
        await navigator.clipboard.writeText(tsv(table));
      } catch {
        // A page from a file may have no clipboard: the selection can be copied by hand.
        select(table);
        done = document.execCommand("copy") ? "Copied" : "Selected: copy it";
      }
      button.textContent = done;
      setTimeout(() => (button.textContent = name), 2000);
    });
    table.closest(".scroll").after(button);
  }
})();
