// The parts of the page that one can sort, search, open and tick. Text from the data becomes text
// nodes alone, never HTML: names of classes and files may hold anything.
"use strict";

(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const report = read("data");
  const thumbnails = read("thumbnails");
  const columnOf = new Map(report.classes.map((each, column) => [each.name, column]));
  const byId = (id) => document.getElementById(id);

  // ---- Elements and numbers --------------------------------------------------------------------

  // An element with attributes, listeners ("onclick") and children: elements, text, or nothing.
  function make(tag, attributes = {}, ...children) {
    const [name, space] = tag.startsWith("svg:") ? [tag.slice(4), "http://www.w3.org/2000/svg"] : [tag, null];
    const element = space ? document.createElementNS(space, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value === true) element.setAttribute(key, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  }

  const known = (value) => value !== null && value !== undefined;

  function figure(value, digits = 2) {
    if (!known(value)) return "–";
    const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
    return value.toLocaleString("en", options).replace("-", "−");
  }

  const signed = (value) => (known(value) && value > 0 ? "+" : "") + figure(value);
  const reach = (interval, show = figure) =>
    known(interval.low) && known(interval.high) ? `${show(interval.low)} to ${show(interval.high)}` : "";

  // ---- Light and dark --------------------------------------------------------------------------

  const system = matchMedia("(prefers-color-scheme: dark)");
  // Pages from the disk may have no storage, and then saying so throws.
  const store = {
    get(key) {
      try { return localStorage.getItem(key); } catch { return null; }
    },
    set(key, value) {
      try { localStorage.setItem(key, value); } catch { /* it lasts as long as the page */ }
    },
  };
  function applyTheme() {
    const chosen = byId("theme").value || (system.matches ? "dark" : "light");
    if (document.documentElement.dataset.theme === chosen) return;
    document.documentElement.dataset.theme = chosen;
    charts.redraw();
  }

  byId("theme").value = store.get("asl-report-theme") || "";
  byId("theme").addEventListener("change", () => {
    store.set("asl-report-theme", byId("theme").value);
    applyTheme();
  });
  system.addEventListener("change", applyTheme);
  applyTheme();

  // ---- Tables that one can sort -----------------------------------------------------------------

  const ROWS = 300; // of 9,605 classes at first, and with each asking for more: all take seconds

  // The columns have a title, `value(row)` to sort by, and `cell(row)`; `open(row)` gives what
  // opens below a row by its name. Returns a function that shows such rows as a filter passes.
  function sortable(place, rows, columns, { start, descending, open }) {
    let order = { column: start, descending };
    let limit = ROWS;
    let passes = () => true;
    const opened = new Set();
    const body = make("tbody");
    const heads = columns.map((column) => make("th", { scope: "col", class: column.class },
      make("button", { type: "button", onclick: () => sort(column) }, column.title)));
    const more = make("button", { type: "button", class: "plain", onclick: () => { limit += ROWS; show(); } });
    place.append(make("table", { class: "sortable" }, make("thead", {}, make("tr", {}, heads)), body), more);

    function sort(column) {
      const same = order.column === column.key;
      order = { column: column.key, descending: same ? !order.descending : Boolean(column.large) };
      show();
    }

    function compare(a, b) {
      const { value } = columns.find((column) => column.key === order.column);
      const [x, y] = [value(a), value(b)];
      if (!known(x) || !known(y)) return known(y) - known(x); // what is not defined comes last
      const ahead = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
      return order.descending ? -ahead : ahead;
    }

    function lines(row) {
      const line = make("tr", {}, columns.map((column) => column.cell(row, opened.has(row), () => {
        opened.has(row) ? opened.delete(row) : opened.add(row);
        const fresh = lines(row);
        line.nextSibling?.classList.contains("opened") && line.nextSibling.remove();
        line.replaceWith(...fresh);
        fresh[0].querySelector("button")?.focus();
      })));
      if (!opened.has(row)) return [line];
      return [line, make("tr", { class: "opened" }, make("td", { colspan: columns.length }, open(row)))];
    }

    function show() {
      const shown = rows.filter(passes).sort(compare);
      columns.forEach((column, i) => {
        const sorted = column.key === order.column;
        if (sorted) heads[i].setAttribute("aria-sort", order.descending ? "descending" : "ascending");
        else heads[i].removeAttribute("aria-sort");
      });
      body.replaceChildren(...shown.slice(0, limit).flatMap(lines));
      more.hidden = shown.length <= limit;
      more.textContent = `Show more of ${figure(shown.length, 0)}`;
      return shown.length;
    }

    return (filter) => { passes = filter; return show(); };
  }

  const number = (text, more = "") => make("td", { class: `number ${more}` }, text);
  const numeric = (title, key, value, show, more = "") => (
    { title, key, value, large: true, class: `number ${more}`, cell: (row) => number(show(value(row)), more) });

  // An interval on a scale, as a line with a point.
  function span(interval, low, high, more = "") {
    if (!known(interval.value) || !(high > low)) return null;
    const at = (value) => `${(100 * (Math.min(Math.max(value, low), high) - low)) / (high - low)}%`;
    const line = (from, to, kind) => make("svg:line", { x1: at(from), x2: at(to), y1: "50%", y2: "50%", class: kind });
    return make("svg:svg", { class: `span ${more}`, "aria-hidden": "true" },
      line(low, high, "scale"),
      known(interval.low) && known(interval.high) ? line(interval.low, interval.high, "reach") : null,
      make("svg:circle", { cx: at(interval.value), cy: "50%", r: 3.5, class: "point" }));
  }

  // ---- The table of classes ---------------------------------------------------------------------

  const rules = [...new Set(report.classes.flatMap((each) => each.points.map((point) => point.rule)))];
  byId("rule").append(...rules.map((rule) => make("option", {}, rule)));
  byId("rule").parentElement.hidden = rules.length < 2;
  const atRule = (row) => row.points.find((point) => point.rule === byId("rule").value) || {};
  const figureOfOne = (value) => figure(value, 1);
  const integer = (value) => figure(value, 0);

  const classColumns = [
    { title: "Class", key: "name", value: (row) => row.name,
      cell: (row, isOpen, toggle) => make("th", { scope: "row" },
        make("button", { type: "button", class: "name", "aria-expanded": String(isOpen), onclick: toggle }, row.name),
        row.few ? make("span", { class: "few", title: "too few positives to mean much" }, "few") : null) },
    numeric("AP, %", "AP", (row) => row.AP.value, figure),
    { title: "95 % interval", key: "width", large: true, class: "wide",
      value: (row) => (known(row.AP.low) && known(row.AP.high) ? row.AP.high - row.AP.low : null),
      cell: (row) => make("td", { class: "wide" }, span(row.AP, 0, 100), " ",
        make("span", { class: "muted" }, reach(row.AP, figureOfOne))) },
    numeric("Positives", "positives", (row) => row.positives, integer),
    numeric("Threshold", "threshold", (row) => atRule(row).threshold, (value) => figure(value, 3), "wide"),
    numeric("Precision, %", "precision", (row) => atRule(row).precision, figureOfOne, "wide"),
    numeric("Recall, %", "recall", (row) => atRule(row).recall, figureOfOne, "wide"),
    numeric("F1, %", "f1", (row) => atRule(row).f1, figureOfOne),
  ];

  function pointsTable(row) {
    const heads = ["Rule", "Threshold", "Precision", "Recall", "F1"].map((title, i) => (
      make("th", { scope: "col", class: i ? "number" : null }, title)));
    const lines = row.points.map(({ rule, threshold, precision, recall, f1 }) => (
      make("tr", {}, make("th", { scope: "row" }, rule), number(figure(threshold, 3)),
        [precision, recall, f1].map((each) => number(figureOfOne(each))))));
    return make("table", { class: "small" }, make("thead", {}, make("tr", {}, heads)), make("tbody", {}, lines));
  }

  // Of most classes the edges are those over all cells, and stand there alone.
  const withEdges = (histogram) => ({ ...histogram, edges: histogram.edges || report.scores.edges });

  function classDetails(row) {
    const drawn = [["Scores", charts.histogram(withEdges(row.scores))]];
    if (row.curve) drawn.unshift(["Precision over recall", charts.curve(row.curve)]);
    const figures = drawn.map(([title, specification]) => {
      const place = make("div", { class: "chart" });
      charts.place(place, specification);
      return make("figure", {}, make("figcaption", {}, make("strong", {}, title)), place);
    });
    const links = report.galleries.map((gallery, i) => {
      const count = gallery.examples.filter((example) => example.name === row.name).length;
      return count ? make("button", { type: "button", class: "plain", onclick: () => galleries[i].visit(row.name) },
        `${gallery.title}: ${count}`) : null;
    });
    return [
      make("p", { class: "muted" }, `AP ${figure(row.AP.value)} %`, reach(row.AP) ? ` (${reach(row.AP)})` : "",
        `, ${integer(row.positives)} positives, ${integer(row.negatives)} negatives`),
      make("div", { class: "columns three" }, figures,
        make("div", {}, pointsTable(row), make("div", { class: "buttons" }, links))),
    ];
  }

  const showClasses = sortable(byId("class-table"), report.classes, classColumns,
    { start: "AP", descending: false, open: classDetails });

  function search() {
    const wanted = byId("search").value.trim().toLowerCase();
    const enough = byId("enough").checked;
    const found = showClasses((row) => row.name.toLowerCase().includes(wanted) && !(enough && row.few));
    byId("found").textContent = `${integer(found)} of ${integer(report.classes.length)} classes`;
  }

  for (const id of ["search", "enough", "rule"]) byId(id).addEventListener("input", search);
  search();

  // ---- The comparison ---------------------------------------------------------------------------

  if (report.comparison) {
    const rows = report.comparison.classes;
    const ends = rows.flatMap(({ difference: { value, low, high } }) => [value, low, high]);
    const largest = Math.max(1, ...ends.map((each) => Math.abs(each ?? 0)));
    // Whether the interval leaves 0 out, and on which side it is.
    const clear = ({ low, high }) => {
      if (!known(low) || !known(high) || (low <= 0 && high >= 0)) return "unclear";
      return high < 0 ? "minus" : "plus";
    };
    sortable(byId("differences"), rows, [
      { title: "Class", key: "name", value: (row) => row.name, cell: (row) => make("th", { scope: "row" }, row.name) },
      numeric("AP, %", "AP", (row) => row.AP, figure),
      numeric("Other", "other", (row) => row.other, figure),
      numeric("Difference", "difference", (row) => row.difference.value, signed),
      { title: "95 % interval", key: "low", large: true, class: "wide", value: (row) => row.difference.low,
        cell: ({ difference }) => make("td", { class: "wide" },
          span(difference, -largest, largest, clear(difference)), " ",
          make("span", { class: "muted" }, reach(difference, signed))) },
    ], { start: "difference", descending: false })(() => true);
  }

  // ---- Corrections ------------------------------------------------------------------------------

  // By image and class: the example whose label is wrong.
  const corrections = new Map();
  const keyOf = (example) => JSON.stringify([example.file, example.name]);
  const memory = `asl-report-${report.key}`;
  const boxes = new Map(); // the tick boxes on the page, by the same keys

  function remember() {
    store.set(memory, JSON.stringify([...corrections.keys()]));
    const count = corrections.size;
    byId("corrections").hidden = !count;
    byId("how-many").textContent = `${count} ${count === 1 ? "correction" : "corrections"}`;
    const named = namesFit();
    byId("as-names").disabled = !named;
    if (!named) byId("as-names").title = "cells that are not annotated, or names with |, need a column for each class";
  }

  function tick(example, wrong) {
    const key = keyOf(example);
    wrong ? corrections.set(key, example) : corrections.delete(key);
    for (const box of boxes.get(key) || []) {
      box.checked = wrong;
      box.closest(".example").classList.toggle("ticked", wrong);
    }
    remember();
  }

  function tickBox(example) {
    const key = keyOf(example);
    if (!example.file) return null; // nothing that a table could name
    const label = `The label is wrong: ${example.name} is ${example.annotated ? "not there" : "there"}`;
    const box = make("input", { type: "checkbox", onchange: () => tick(example, box.checked) });
    box.checked = corrections.has(key);
    boxes.set(key, [...(boxes.get(key) || []), box]);
    return make("label", { class: "tick" }, box, label);
  }

  // The images that have corrections: file -> Map(class -> whether it is there), of what is known.
  function corrected() {
    const images = new Map();
    for (const example of corrections.values()) {
      if (!images.has(example.file)) images.set(example.file, new Map(example.truth.map((name) => [name, true])));
      images.get(example.file).set(example.name, !example.annotated);
    }
    return images;
  }

  // A list of labels says that all others are absent, which is not known of all sets.
  function namesFit() {
    const labels = [...corrected().values()].flatMap((each) => [...each.keys()]);
    return report.full && !labels.some((name) => name.includes("|"));
  }

  const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

  function download(name, lines) {
    const text = lines.map((line) => line.map(cell).join(",") + "\n").join("");
    const address = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    make("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }

  byId("as-names").addEventListener("click", () => {
    const lines = [...corrected()].map(([file, labels]) => (
      [file, [...labels].filter(([, there]) => there).map(([name]) => name).join("|")]));
    download("corrections.csv", [["path", "labels"], ...lines]);
  });

  byId("as-columns").addEventListener("click", () => {
    const names = [...columnOf.keys()];
    const other = report.full ? "0" : ""; // empty: not known here, and so to be left as it was
    const lines = [...corrected()].map(([file, labels]) => (
      [file, ...names.map((name) => (labels.has(name) ? (labels.get(name) ? "1" : "0") : other))]));
    download("corrections.csv", [["path", ...names], ...lines]);
  });

  byId("forget").addEventListener("click", () => {
    if (!confirm(`Forget ${byId("how-many").textContent}?`)) return;
    for (const example of [...corrections.values()]) tick(example, false);
  });

  // ---- Galleries --------------------------------------------------------------------------------

  const FIRST_EXAMPLES = 12;

  function photograph(file, name, objects = []) {
    const picture = thumbnails[file];
    if (!picture) {
      const reason = file in thumbnails ? "cannot be read" : "no photograph";
      return make("div", { class: "photograph" }, make("div", { class: "lacking" }, reason));
    }
    const outlines = objects.flatMap((object) => object.polygons.map((points) => make("svg:polygon",
      { points: points.join(" "), class: object.name === name ? "this" : null }, make("svg:title", {}, object.name))));
    // The class in question last, above the others.
    outlines.sort((a, b) => a.classList.contains("this") - b.classList.contains("this"));
    return make("div", { class: "photograph" }, make("div", { class: "frame" },
      make("img", { src: `data:image/webp;base64,${picture}`, alt: file, decoding: "async" }),
      outlines.length ? make("svg:svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none" }, outlines) : null));
  }

  // Names with commas between them, that of the class in question marked.
  function names(list, marked, show = (each) => each) {
    if (!list.length) return ["none"];
    return list.flatMap((each, i) => [
      i ? ", " : "",
      make("span", { class: (each.name ?? each) === marked ? "this-class" : null }, show(each))]);
  }

  function card(example) {
    const quality = known(example.quality) ? `, fits ${figure(example.quality)}` : "";
    return make("article", { class: corrections.has(keyOf(example)) ? "example ticked" : "example" },
      photograph(example.file, example.name, example.objects),
      make("div", { class: "about" },
        make("div", { class: "question" }, make("span", {}, example.name), make("span", {}, figure(example.score))),
        make("div", {}, make("span", { class: "word" }, "truth "), names(example.truth, example.name)),
        make("div", {}, make("span", { class: "word" }, "predicted "),
          names(example.predicted, example.name, (each) => `${each.name} ${figure(each.score)}`)),
        make("div", { class: "file" }, `${example.file} (row\u00a0${example.row}${quality})`.trim()),
        tickBox(example)));
  }

  function openGallery(place, gallery) {
    const body = place.querySelector(".body");
    const present = [...new Set(gallery.examples.map((each) => each.name))].sort((a, b) => a.localeCompare(b, "en"));
    const choice = make("select", { onchange: () => { limit = FIRST_EXAMPLES; show(); } },
      make("option", { value: "" }, `all (${present.length} classes)`),
      present.map((name) => make("option", { value: name }, name)));
    const outlined = make("input", { type: "checkbox", onchange: () => toggle() });
    const toggle = () => grid.classList.toggle("without", !outlined.checked);
    outlined.checked = true;
    const grid = make("div", { class: "grid" });
    const more = make("button", { type: "button", class: "plain", onclick: () => { limit = Infinity; show(); } });
    let limit = FIRST_EXAMPLES;

    function show() {
      const shown = gallery.examples.filter((each) => !choice.value || each.name === choice.value);
      grid.replaceChildren(...shown.slice(0, limit).map(card));
      more.hidden = shown.length <= limit;
      more.textContent = `Show all ${integer(shown.length)}`;
    }

    const hasOutlines = gallery.examples.some((each) => each.objects.length);
    body.append(make("div", { class: "controls" }, make("label", {}, "Class ", choice),
      hasOutlines ? make("label", { class: "tick" }, outlined, "outlines of objects") : null), grid, more);
    show();
    return (name) => { choice.value = name; limit = FIRST_EXAMPLES; show(); };
  }

  // What is inside is made when it is opened for the first time.
  function whenOpened(details, build) {
    let built = null;
    const ready = () => (built ??= build());
    details.addEventListener("toggle", () => details.open && ready());
    return ready;
  }

  const galleries = [...document.querySelectorAll("[data-gallery]")].map((details, i) => {
    const ready = whenOpened(details, () => openGallery(details, report.galleries[i]));
    return { visit(name) {
      const filter = ready();
      details.open = true;
      filter(name);
      details.closest("section").scrollIntoView();
      details.querySelector("select").focus({ preventScroll: true });
    } };
  });

  function twinCard(twin) {
    const side = (file, split, labels) => make("div", {}, photograph(file, ""), make("div", { class: "about" },
      make("div", {}, make("strong", {}, split), " ", labels.join(", ") || "none"),
      make("div", { class: "file" }, file)));
    const differ = twin.labels.join("|") !== twin.other_labels.join("|") ? ", other labels" : "";
    return make("article", { class: "example" },
      make("div", { class: "two" },
        side(twin.file, twin.split, twin.labels), side(twin.other, twin.other_split, twin.other_labels)),
      make("div", { class: "about muted" }, `${twin.bits} ${twin.bits === 1 ? "bit" : "bits"} apart${differ}`));
  }

  const twins = document.querySelector("[data-twins]");
  if (twins) {
    const pairs = () => make("div", { class: "grid pairs" }, report.twins.map(twinCard));
    whenOpened(twins, () => twins.querySelector(".body").append(pairs()));
  }

  // ---- What stands open at the start ------------------------------------------------------------

  const shown = report.galleries.flatMap((gallery) => gallery.examples);
  const ticked = new Set(JSON.parse(store.get(memory) || "[]"));
  for (const each of shown) if (ticked.has(keyOf(each))) corrections.set(keyOf(each), each);
  remember();

  const first = document.querySelector("[data-gallery]");
  if (first) first.open = true;
  if (report.curve) charts.place(byId("curve"), charts.curve(report.curve));
  charts.place(byId("histogram"), charts.histogram(report.scores));
  if (report.reliability) charts.place(byId("reliability"), charts.reliability(report.reliability));
  report.together.forEach((each, i) => charts.place(byId(`together-${i}`), charts.together(each)));
})();
