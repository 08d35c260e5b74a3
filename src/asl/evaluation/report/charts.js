// The charts of the page, drawn by Vega-Lite in the colours of the page. Each is given as a function
// that makes its specification: another theme asks it again.
"use strict";

const charts = (() => {
  const placed = new Map(); // element -> the function
  const zeroToOne = { domain: [0, 1] };

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  function look() {
    const [text, muted, line] = ["text", "muted", "line"].map(colour);
    const ink = { labelColor: muted, titleColor: text, titleFontWeight: "normal", labelFontSize: 11 };
    return {
      background: "transparent",
      font: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif",
      view: { stroke: null },
      axis: { ...ink, gridColor: line, domainColor: muted, tickColor: muted, labelFlush: false, tickCount: 5 },
      legend: { ...ink, orient: "top", title: null, symbolType: "square" },
    };
  }

  function draw(element) {
    if (!element.isConnected) return placed.delete(element); // of a class that was closed again
    const spec = {
      width: "container",
      height: "container",
      autosize: { type: "fit", contains: "padding" },
      config: look(),
      ...placed.get(element)(),
    };
    // `ast`: expressions are interpreted, as the policy of the page forbids to compile them.
    const options = { ast: true, actions: false, renderer: "svg", tooltip: { disableDefaultStyle: true } };
    return vegaEmbed(element, spec, options).catch((error) => console.error(error));
  }

  function redraw() {
    for (const element of [...placed.keys()]) if (element.hasChildNodes()) draw(element);
  }

  // They are drawn when they come into sight, as each takes some 50 ms.
  const sight = new IntersectionObserver((entries) => {
    for (const { target } of entries.filter((each) => each.isIntersecting)) {
      sight.unobserve(target);
      draw(target);
    }
  }, { rootMargin: "300px" });

  function place(element, specification) {
    placed.set(element, specification);
    sight.observe(element);
  }

  addEventListener("beforeprint", () => [...placed.keys()].forEach(draw));

  // Precision over recall.
  function curve({ recall, precision }) {
    const values = recall.map((each, i) => ({ recall: each, precision: precision[i] }));
    return () => ({
      data: { values },
      encoding: {
        x: { field: "recall", type: "quantitative", scale: zeroToOne, title: "recall" },
        y: { field: "precision", type: "quantitative", scale: zeroToOne, title: "precision" },
        order: { value: null },
        tooltip: ["recall", "precision"].map((field) => ({ field, type: "quantitative", format: ".3f" })),
      },
      layer: [
        { mark: { type: "line", color: colour("accent"), strokeWidth: 2 } },
        { mark: { type: "point", opacity: 0, size: 120, filled: true, tooltip: true } },
      ],
    });
  }

  // The cells by score, on a logarithmic scale: the many easy negatives would hide all others.
  function histogram({ edges, positives, negatives }) {
    const bars = Object.entries({ negatives, positives }).flatMap(([kind, counts]) => counts.map((cells, i) => (
      { kind, cells, from: edges[i], to: edges[i + 1], floor: 0.5, top: Math.max(cells, 0.5) })));
    const ends = bars.filter(({ to }) => to === edges.at(-1)).map((bar) => ({ ...bar, from: bar.to }));
    return () => ({
      encoding: {
        x: { field: "from", type: "quantitative", scale: zeroToOne, title: "score", axis: { grid: false } },
        y: {
          field: "top", type: "quantitative", title: "cells", scale: { type: "log", domainMin: 0.5 },
          axis: { format: "~s", tickCount: 4, grid: false },
        },
        color: {
          field: "kind", type: "nominal", title: null,
          scale: { domain: ["positives", "negatives"], range: [colour("accent"), colour("warm")] },
        },
      },
      layer: [
        {
          data: { values: bars },
          mark: { type: "rect", opacity: 0.2 },
          encoding: {
            x2: { field: "to" },
            y2: { field: "floor" },
            tooltip: [
              { field: "kind" }, { field: "from", title: "score from", format: ".2f" },
              { field: "to", format: ".2f" }, { field: "cells", format: "," },
            ],
          },
        },
        {
          data: { values: [...bars, ...ends] },
          mark: { type: "line", interpolate: "step-after", strokeWidth: 1.5 },
        },
      ],
    });
  }

  // The share of positives over the mean score of cells, with the diagonal of a calibrated model.
  function reliability({ score, frequency, cells }) {
    const values = score.map((each, i) => ({ score: each, frequency: frequency[i], cells: cells[i] }));
    const accent = { color: colour("accent") };
    return () => ({
      encoding: {
        x: { field: "score", type: "quantitative", scale: zeroToOne, title: "mean score" },
        y: { field: "frequency", type: "quantitative", scale: zeroToOne, title: "share of positives" },
      },
      layer: [
        {
          data: { values: [{ score: 0, frequency: 0 }, { score: 1, frequency: 1 }] },
          mark: { type: "line", color: colour("muted"), strokeDash: [4, 4], strokeWidth: 1 },
        },
        {
          data: { values },
          mark: { type: "line", ...accent, strokeWidth: 2, point: { size: 45, ...accent }, tooltip: true },
          encoding: {
            tooltip: [
              { field: "score", format: ".3f" }, { field: "frequency", format: ".3f" }, { field: "cells", format: "," },
            ],
          },
        },
      ],
    });
  }

  // A table of shares as a map of colours.
  function together({ classes, table }) {
    const values = table.flatMap((row, i) => row.map((share, j) => ({ row: classes[i], given: classes[j], share })));
    const defined = values.filter(({ share }) => share !== null);
    const axis = { labelLimit: 110, labelFontSize: 10, ticks: false, domain: false, grid: false };
    return () => ({
      data: { values: defined },
      mark: { type: "rect", tooltip: true },
      encoding: {
        x: { field: "given", type: "nominal", sort: classes, title: "given", axis: { ...axis, labelAngle: -90 } },
        y: { field: "row", type: "nominal", sort: classes, title: null, axis },
        color: {
          field: "share", type: "quantitative",
          scale: { range: [colour("panel"), colour("accent")], domainMin: 0 },
          legend: { gradientLength: 140, gradientThickness: 8, format: ".0%", title: null, tickCount: 3 },
        },
        tooltip: [{ field: "row", title: "class" }, { field: "given" }, { field: "share", format: ".1%" }],
      },
    });
  }

  return { place, redraw, curve, histogram, reliability, together };
})();
