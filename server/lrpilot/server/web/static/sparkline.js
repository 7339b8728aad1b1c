// The course of a loss, small enough for a line of a table.

import { drawing } from "./dom.js";

const WIDTH = 120;
const HEIGHT = 28;
const MARGIN = 3;

/**
 * Return an SVG of `points`, a list of [progress, loss].
 *
 * The axis is logarithmic where every loss is above 0, so that the end of a run shows beside its
 * start. A loss that is not finite breaks the line and is a mark at its foot.
 */
export function sparkline(points) {
  const finite = points.filter(([, loss]) => Number.isFinite(loss));
  const svg = drawing("svg", {
    class: "sparkline",
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    width: WIDTH,
    height: HEIGHT,
    "aria-hidden": "true",
  });
  if (points.length === 0) return svg;
  const height = finite.every(([, loss]) => loss > 0) ? Math.log : (loss) => loss;
  const [left, right] = [points[0][0], points.at(-1)[0]];
  const heights = finite.map(([, loss]) => height(loss));
  const [low, high] = [Math.min(...heights), Math.max(...heights)];
  const x = (progress) => MARGIN + ((WIDTH - 2 * MARGIN) * (progress - left)) / (right - left || 1);
  // A loss that never changes lies in the middle.
  const y = (loss) =>
    high === low
      ? HEIGHT / 2
      : HEIGHT - MARGIN - ((HEIGHT - 2 * MARGIN) * (height(loss) - low)) / (high - low);
  let path = "";
  let joined = false;
  for (const [progress, loss] of points) {
    if (Number.isFinite(loss)) {
      path += `${joined ? "L" : "M"}${x(progress).toFixed(1)} ${y(loss).toFixed(1)}`;
      joined = true;
    } else {
      joined = false;
      svg.append(
        drawing("path", {
          class: "not-finite",
          d: `M${x(progress).toFixed(1)} ${HEIGHT - 7}v6`,
        }),
      );
    }
  }
  svg.append(drawing("path", { class: "line", d: path }));
  if (joined) {
    const [progress, loss] = points.at(-1);
    svg.append(
      drawing("circle", { class: "end", cx: x(progress).toFixed(1), cy: y(loss).toFixed(1), r: 2 }),
    );
  }
  return svg;
}
