// The picture of a change: LR before and after over the whole attempt, and WD where it changes.

import { element } from "./dom.js";
import { alikeGroups } from "./effect.js";
import { compact, rate } from "./format.js";
import uPlot from "./vendor/uplot/uPlot.esm.js";

/** Most groups drawn: there are as many colours. */
const MOST_LINES = 8;

const HEIGHT = 190;

/** Draw the preview of a dry run's answer in `root`; return how to end it. */
export function drawEffect(root, answer) {
  const { preview, effective, run } = answer;
  if (preview.length === 0) return () => {};
  const groups = alikeGroups(
    run.values.map((values) => values.name),
    preview,
  ).slice(0, MOST_LINES);
  const all = [
    { title: "learning rate", before: "before", after: "after" },
    { title: "weight decay", before: "weight_decay_before", after: "weight_decay_after" },
  ];
  const changed = all.filter(({ before, after }) =>
    preview.some((point) => JSON.stringify(point[before]) !== JSON.stringify(point[after])),
  );
  // What stays as it is, the table says.
  const measures = changed.length > 0 ? changed : all.slice(0, 1);
  const places = measures.map(({ title }) =>
    element("div", { role: "img", "aria-label": `${title} before and after; the table has the numbers` }),
  );
  root.replaceChildren(
    legend(groups),
    ...measures.flatMap(({ title }, index) => [
      element("p", { class: "axis", "aria-hidden": "true", text: title }),
      places[index],
    ]),
    element("p", { class: "axis end", "aria-hidden": "true", text: `progress (${run.unit})` }),
  );
  let charts = [];
  const draw = () => {
    for (const chart of charts) chart.destroy();
    charts = measures.map((measure, index) =>
      drawMeasure(places[index], measure, groups, preview, effective),
    );
  };
  draw();
  // Colours of a canvas are read once.
  document.addEventListener("themechange", draw);
  const observer = new ResizeObserver(() => {
    charts.forEach((chart, index) => {
      const width = places[index].clientWidth;
      if (width !== chart.width) chart.setSize({ width, height: HEIGHT });
    });
  });
  observer.observe(root);
  return () => {
    document.removeEventListener("themechange", draw);
    observer.disconnect();
    for (const chart of charts) chart.destroy();
  };
}

function drawMeasure(place, measure, groups, preview, effective) {
  const styles = getComputedStyle(document.documentElement);
  const colour = (name) => styles.getPropertyValue(name).trim();
  const progress = preview.map((point) => point.progress);
  // Below the change nothing differs.
  const first = Math.max(0, progress.findIndex((at) => at >= effective) - 1);
  const series = [{}];
  const data = [progress];
  groups.forEach(({ index }, number) => {
    const before = preview.map((point) => point[measure.before][index] ?? null);
    const after = preview.map((point) => point[measure.after][index] ?? null);
    const line = { points: { show: false }, stroke: colour(`--series-${number}`) };
    series.push({ ...line, width: 2 });
    data.push(after);
    if (before.some((value, at) => value !== after[at])) {
      const old = groups.length > 1 ? line : { ...line, stroke: colour("--faint") };
      series.push({ ...old, width: 1.5, dash: [6, 4] });
      data.push(before.map((value, at) => (at < first ? null : value)));
    }
  });
  const axis = {
    stroke: colour("--faint"),
    grid: { stroke: colour("--grid"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
  };
  const options = {
    width: place.clientWidth,
    height: HEIGHT,
    legend: { show: false },
    cursor: { show: false },
    scales: {
      x: { time: false },
      y: { range: (_, __, high) => [0, high > 0 ? 1.08 * high : 1] },
    },
    axes: [
      { ...axis, size: 26, values: (_, ticks) => ticks.map(compact) },
      { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => rate(tick)) },
    ],
    series,
    hooks: { drawClear: [(chart) => drawFixed(chart, effective, colour)] },
  };
  return new uPlot(options, data, place);
}

/** Shade what is fixed, up to where the change shows. */
function drawFixed(chart, effective, colour) {
  const { ctx, bbox } = chart;
  const edge = Math.min(Math.max(chart.valToPos(effective, "x", true), bbox.left), bbox.left + bbox.width);
  ctx.save();
  ctx.fillStyle = colour("--raised");
  ctx.fillRect(bbox.left, bbox.top, edge - bbox.left, bbox.height);
  ctx.strokeStyle = colour("--ink");
  ctx.setLineDash([2, 4]);
  ctx.beginPath();
  ctx.moveTo(edge, bbox.top);
  ctx.lineTo(edge, bbox.top + bbox.height);
  ctx.stroke();
  ctx.restore();
}

function legend(groups) {
  const key = (mark, text) => element("li", {}, element("span", { class: `swatch ${mark}` }), text);
  const lines =
    groups.length > 1 ? groups.map(({ name }, number) => key(`after series-${number}`, name)) : [key("after series-0", "after")];
  return element("ul", { class: "swatches" }, lines, key("before", "before"), key("fixed", "fixed already"));
}
