// What is painted onto the charts beside the curves: stages, what is fixed ahead, attempts, losses
// that are not finite, losses that were forgotten.

import { color } from "./chart.js";

const FONT = "system-ui, sans-serif";

/** Paint the stages as bands, every other one, and the stretch that is fixed ahead unless all `isOver`. */
export function paintBands(chart, ctx, curves, isOver) {
  if (!curves) return;
  const { bbox } = chart.plot;
  curves.stages.forEach((stage, index) => {
    if (index % 2) return;
    fillBetween(chart, ctx, stage.begin, stage.end, color("stage"), 0);
  });
  if (isOver) return;
  if (curves.horizon > curves.progress)
    fillBetween(chart, ctx, curves.progress, curves.horizon, color("future"), 3);
  ctx.strokeStyle = color("series-0");
  ctx.lineWidth = devicePixelRatio;
  vertical(chart, ctx, curves.progress, bbox, [2, 3]);
}

function fillBetween(chart, ctx, begin, end, fill, least) {
  const { bbox } = chart.plot;
  const left = Math.max(bbox.left, position(chart, begin));
  const right = Math.min(
    bbox.left + bbox.width,
    Math.max(position(chart, end), left + least * devicePixelRatio),
  );
  if (right <= left) return;
  ctx.fillStyle = fill;
  ctx.fillRect(left, bbox.top, right - left, bbox.height);
}

function position(chart, progress) {
  return chart.plot.valToPos(progress, "x", true);
}

function vertical(chart, ctx, progress, bbox, dash) {
  const x = Math.round(position(chart, progress)) + 0.5;
  if (x < bbox.left || x > bbox.left + bbox.width) return false;
  ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
  ctx.beginPath();
  ctx.moveTo(x, bbox.top);
  ctx.lineTo(x, bbox.top + bbox.height);
  ctx.stroke();
  ctx.setLineDash([]);
  return true;
}

/** Paint a line where each attempt but the first opened; with their numbers where there is space. */
export function paintAttempts(chart, ctx, curves, isNumbered) {
  if (!curves) return;
  const { bbox } = chart.plot;
  const ratio = devicePixelRatio;
  ctx.strokeStyle = color("series-3");
  ctx.fillStyle = color("series-3");
  ctx.lineWidth = ratio;
  ctx.font = `${11 * ratio}px ${FONT}`;
  ctx.textBaseline = "bottom";
  ctx.textAlign = "left";
  let free = -Infinity;
  for (const item of curves.losses) {
    if (item.attempt < 2 || !vertical(chart, ctx, item.begin, bbox, [])) continue;
    if (!isNumbered) continue;
    const text = `attempt ${item.attempt}`;
    const x = position(chart, item.begin) + 4 * ratio;
    const width = ctx.measureText(text).width;
    if (x < free || x + width > bbox.left + bbox.width) continue;
    ctx.fillText(text, x, bbox.top + bbox.height - 3 * ratio);
    free = x + width + 6 * ratio;
  }
}

/** Paint the names of the stages above the plot, as far as each has space. */
export function paintStageNames(chart, ctx, curves) {
  if (!curves) return;
  const { bbox } = chart.plot;
  const ratio = devicePixelRatio;
  ctx.fillStyle = color("faint");
  ctx.strokeStyle = color("line");
  ctx.lineWidth = ratio;
  ctx.font = `600 ${11 * ratio}px ${FONT}`;
  ctx.textBaseline = "bottom";
  ctx.textAlign = "left";
  for (const stage of curves.stages) {
    const left = Math.max(bbox.left, position(chart, stage.begin));
    const right = Math.min(bbox.left + bbox.width, position(chart, stage.end));
    const text = fitted(ctx, stage.name, right - left - 8 * ratio);
    if (text) ctx.fillText(text, left + 3 * ratio, bbox.top - 3 * ratio);
    if (left > bbox.left && right > left) {
      ctx.beginPath();
      ctx.moveTo(left, bbox.top - 14 * ratio);
      ctx.lineTo(left, bbox.top);
      ctx.stroke();
    }
  }
}

function fitted(ctx, text, width) {
  if (width < 12 * devicePixelRatio) return "";
  if (ctx.measureText(text).width <= width) return text;
  for (let length = text.length - 1; length > 1; length -= 1) {
    const shorter = `${text.slice(0, length)}…`;
    if (ctx.measureText(shorter).width <= width) return shorter;
  }
  return "";
}

/** Paint what was forgotten of superseded attempts, faintly. */
export function paintForgotten(chart, ctx, curves) {
  ctx.strokeStyle = color("faint");
  ctx.globalAlpha = 0.45;
  ctx.lineWidth = devicePixelRatio;
  clip(chart, ctx);
  for (const { x, y } of curves) {
    ctx.beginPath();
    let isDown = false;
    for (let index = 0; index < x.length; index += 1) {
      const isShown = y[index] !== null && Number.isFinite(y[index]) && (!chart.isLog || y[index] > 0);
      if (isShown) {
        const place = [position(chart, x[index]), chart.plot.valToPos(y[index], "y", true)];
        if (isDown) ctx.lineTo(...place);
        else ctx.moveTo(...place);
      }
      isDown = isShown;
    }
    ctx.stroke();
  }
}

function clip(chart, ctx) {
  const { left, top, width, height } = chart.plot.bbox;
  ctx.beginPath();
  ctx.rect(left, top, width, height);
  ctx.clip();
}

/** Paint a mark at the top edge for each loss that is not finite. */
export function paintNonfinite(chart, ctx, places) {
  const { bbox } = chart.plot;
  const size = 4 * devicePixelRatio;
  const top = bbox.top + size + 2 * devicePixelRatio;
  ctx.strokeStyle = color("bad");
  ctx.lineWidth = 1.6 * devicePixelRatio;
  ctx.beginPath();
  for (const progress of places) {
    const x = position(chart, progress);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.moveTo(x - size, top - size);
    ctx.lineTo(x + size, top + size);
    ctx.moveTo(x - size, top + size);
    ctx.lineTo(x + size, top - size);
  }
  ctx.stroke();
}

/** Paint a line where the selected adjustment takes effect. */
export function paintSelected(chart, ctx, progress) {
  if (progress === null) return;
  ctx.strokeStyle = color("ink");
  ctx.lineWidth = 1.5 * devicePixelRatio;
  vertical(chart, ctx, progress, chart.plot.bbox, [5, 3]);
}
