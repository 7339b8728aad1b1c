// One chart over progress: uPlot, with what all charts of a run share.

import uPlot from "./vendor/uplot/uPlot.esm.js";

import { element } from "./dom.js";
import { lowerBound, nearest, valueAt } from "./curves.js";
import { compact, count, rate } from "./format.js";

const STEP = 0.1;
const FACTOR = 0.7;
/** Pixels that a drag must cover to count as one. */
const LEAST_DRAG = 6;
/** Greatest value of a logarithmic axis over its least. */
const DECADES = 1e5;
/** Rows of "data as a table" at most. */
const MOST_ROWS = 400;
const LABEL = "12px system-ui, sans-serif";

/** Return a colour of the theme as it is now. */
export function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/**
 * A chart with its heading, legend, table and gestures.
 *
 * `update` takes a list of series `{ key, label, color, x, y, width, dash, isPlain, isListed,
 * isStraight, reads }`: `color` names one of the theme; `isPlain`: points as well as lines;
 * `isListed: false`: not in legend and table, which read `reads` in place of x and y where it is given;
 * `isStraight`: values lie between points too. `paint(chart, context)` and `paintBelow` draw on the
 * canvas, above and below the curves. `remark` says what is not on it; the chart itself adds what has
 * no place on a logarithmic axis.
 */
export class Chart {
  #plot = null;
  #series = [];
  #signature = "";
  #table = null;
  #legend = element("ul", { class: "legend" });
  #canvas = element("div", { class: "canvas", role: "img" });
  #remarks = element("p", { class: "faint remarks" });
  #values = new Map();
  /** Progress at which the cursor is; null: on no chart. */
  #at = null;
  #watcher = new ResizeObserver(() => this.#resize());
  #stopView;
  isLog = false;

  constructor({
    title,
    viewport,
    unit,
    heights,
    top = 8,
    isZeroBased = false,
    logToggle = null,
    fit = null,
    paint,
    paintBelow,
    describe,
    remark = () => "",
  }) {
    Object.assign(this, {
      title,
      viewport,
      unit,
      heights,
      top,
      isZeroBased,
      fit,
      paint,
      paintBelow,
      describe,
      remark,
    });
    /** Laid over the plot, for what is not painted: markers. */
    this.overlay = element("div", { class: "overlay" });
    this.tools = element("div", { class: "tools" });
    if (logToggle) {
      this.logButton = this.#toggle("Log axis", () => logToggle(!this.isLog));
    }
    const tableButton = this.#toggle("As a table", () => {
      this.#table = this.#table ? null : element("div", { class: "scroll table-holder", tabindex: 0 });
      tableButton.setAttribute("aria-pressed", this.#table !== null);
      this.#tableHolder.replaceChildren(...(this.#table ? [this.#table] : []));
      this.#fillTable();
    });
    this.frame = element(
      "div",
      {
        class: "frame",
        tabindex: 0,
        role: "group",
        "aria-label": `${title}: arrow keys move, plus and minus zoom, 0 shows the whole run`,
        onkeydown: (event) => this.#key(event),
      },
      this.#canvas,
      this.overlay,
    );
    this.#tableHolder = element("div");
    this.root = element(
      "figure",
      { class: "chart" },
      element("figcaption", {}, element("h3", { text: title }), this.#legend, this.tools),
      this.frame,
      this.#remarks,
      this.#tableHolder,
    );
    this.#watcher.observe(this.#canvas);
    this.#stopView = viewport.onChange(() => this.#move());
    this.#onTheme = () => this.#plot?.redraw(false, true);
    document.addEventListener("themechange", this.#onTheme);
  }

  #tableHolder;
  #onTheme;

  #toggle(text, onclick) {
    const button = element("button", {
      class: "button small",
      type: "button",
      "aria-pressed": "false",
      text,
      onclick,
    });
    button.setAttribute("aria-label", `${this.title}: ${text.toLowerCase()}`);
    this.tools.append(button);
    return button;
  }

  /** End it. */
  destroy() {
    this.#stopView();
    this.#watcher.disconnect();
    document.removeEventListener("themechange", this.#onTheme);
    this.#plot?.destroy();
    this.root.remove();
  }

  /** The uPlot, where there are data. */
  get plot() {
    return this.#plot;
  }

  /** Show these series; see the class. `isLog`: on a logarithmic axis. */
  update(series, isLog = false) {
    this.#series = series;
    this.isLog = isLog;
    this.logButton?.setAttribute("aria-pressed", isLog);
    const signature = JSON.stringify([
      isLog,
      series.map(({ key, width, dash, color: name }) => [key, width, dash, name]),
    ]);
    const data = this.#joined();
    if (this.#plot && signature === this.#signature) {
      this.#plot.setData(data, false);
      this.#move();
    } else {
      this.#signature = signature;
      this.#build(data);
    }
    this.#showLegend();
    this.#fillTable();
    this.#describe();
  }

  /** Paint again: something other than the series changed. */
  redraw() {
    this.#plot?.redraw(false, false);
  }

  /** Return where a value is, in CSS pixels from the overlay's corner; null outside of what is seen. */
  place(x, y) {
    const plot = this.#plot;
    if (!plot || x < this.viewport.min || x > this.viewport.max) return null;
    const left = plot.valToPos(x, "x");
    const isOnAxis = y !== null && Number.isFinite(y) && (!this.isLog || y > 0);
    const top = isOnAxis ? plot.valToPos(y, "y") : plot.over.clientHeight - 8;
    return [left, Math.min(Math.max(top, 8), plot.over.clientHeight - 8)];
  }

  #joined() {
    // On a logarithmic axis there is no place for zero and below; nowhere is one for NaN.
    const isShown = (value) => value !== null && Number.isFinite(value) && (!this.isLog || value > 0);
    const tables = this.#series.map(({ x, y }) => [x, y.map((value) => (isShown(value) ? value : null))]);
    return tables.length ? uPlot.join(tables) : [[]];
  }

  #build(data) {
    this.#plot?.destroy();
    const { width, height } = this.#size();
    const axis = {
      stroke: () => color("faint"),
      font: LABEL,
      grid: { stroke: () => color("grid"), width: 1 },
      ticks: { stroke: () => color("grid"), width: 1, size: 5 },
    };
    this.#plot = new uPlot(
      {
        width,
        height,
        padding: [this.top, 24, 0, 0],
        legend: { show: false },
        scales: {
          x: { time: false, auto: false, range: (_, min, max) => [min, max] },
          y: { distr: this.isLog ? 3 : 1, range: (_, min, max) => this.#yRange(min, max) },
        },
        axes: [
          {
            ...axis,
            size: 28,
            gap: 4,
            space: () => this.#tickSpace(),
            incrs: INCREMENTS,
            values: (_, splits) => splits.map(xLabels(splits)),
          },
          {
            ...axis,
            size: 62,
            gap: 4,
            space: 32,
            values: (_, splits) => splits.map((value) => (value === null ? "" : rate(value, 6))),
          },
        ],
        series: [
          {},
          ...this.#series.map((item) => ({
            label: item.label,
            stroke: () => color(item.color),
            width: item.width ?? 1.5,
            pxAlign: 0,
            dash: item.dash,
            points: item.isPlain ? { show: true, size: 5 } : { size: 4 },
          })),
        ],
        cursor: {
          // Within all charts of the page the cursor is at one progress; gestures go by the viewport.
          sync: {
            key: "progress",
            setSeries: false,
            scales: ["x", null],
            filters: { pub: (type) => type === "mousemove" || type === "mouseleave" },
          },
          drag: { x: true, y: false, setScale: false },
          points: { size: 7 },
          y: false,
          bind: {
            mousedown: (_, __, handle) => (event) => {
              if (!event.shiftKey) handle(event);
              return null;
            },
            dblclick: () => () => {
              this.viewport.reset();
              return null;
            },
          },
        },
        hooks: {
          drawClear: [(plot) => this.#painted(plot, this.paintBelow)],
          draw: [(plot) => this.#painted(plot, this.paint)],
          setCursor: [
            (plot) => this.#showValues(plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : null),
          ],
          setSelect: [(plot) => this.#selected(plot)],
        },
      },
      data,
      this.#canvas,
    );
    this.#gestures(this.#plot.over);
    this.#move();
  }

  #painted(plot, paint) {
    if (!paint) return;
    const { ctx } = plot;
    ctx.save();
    paint(this, ctx);
    ctx.restore();
  }

  #size() {
    const width = Math.max(200, this.#canvas.clientWidth);
    return { width, height: this.heights[width < 600 ? 1 : 0] };
  }

  #resize() {
    if (!this.#plot) return;
    const size = this.#size();
    if (size.width === this.#plot.width && size.height === this.#plot.height) return;
    this.#plot.setSize(size);
    this.#placeOverlay();
  }

  #move() {
    if (!this.#plot) return;
    this.#plot.setScale("x", { min: this.viewport.min, max: this.viewport.max });
    this.#placeOverlay();
    this.#showRemarks();
  }

  #placeOverlay() {
    // uPlot draws in a microtask; the places are asked for behind it.
    queueMicrotask(() => {
      if (!this.#plot) return;
      const { over } = this.#plot;
      for (const side of ["left", "top", "width", "height"]) this.overlay.style[side] = over.style[side];
      this.onPlaced?.();
    });
  }

  #yRange(least, greatest) {
    const [low, max] = this.fit?.(this.viewport.min, this.viewport.max) ?? [least, greatest];
    // A value that comes down to almost nothing would leave no room for all others.
    const min = this.isLog && low !== null ? Math.max(low, max / DECADES) : low;
    if (min === null || max === null || !Number.isFinite(min) || !Number.isFinite(max))
      return this.isLog ? [0.1, 10] : [0, 1];
    if (this.isLog)
      return min === max ? [min / 2, max * 2] : uPlot.rangeLog(min * 0.95, max * 1.05, 10, false);
    const from = this.isZeroBased ? Math.min(0, min) : min;
    const pad = 0.06 * (max - from) || 0.1 * Math.abs(max) || 1;
    return [this.isZeroBased && min >= 0 ? 0 : from - pad, max + pad];
  }

  /** Return the least space between two ticks of progress: where all its digits are needed, theirs. */
  #tickSpace() {
    const { min, max } = this.viewport;
    return max - min < max / 1000 ? Math.max(84, 10 * count(max).length) : 84;
  }

  #selected(plot) {
    const { left, width } = plot.select;
    if (width < LEAST_DRAG) return;
    const range = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.viewport.show(...range);
  }

  #key(event) {
    if (event.target !== this.frame || event.ctrlKey || event.metaKey || event.altKey) return;
    const actions = {
      ArrowLeft: () => this.viewport.pan(-STEP),
      ArrowRight: () => this.viewport.pan(STEP),
      "+": () => this.viewport.zoom(FACTOR),
      "=": () => this.viewport.zoom(FACTOR),
      "-": () => this.viewport.zoom(1 / FACTOR),
      0: () => this.viewport.reset(),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  /** Wheel, shift-drag and touch; drags without shift are uPlot's, see `#selected`. */
  #gestures(over) {
    const at = (clientX) => {
      const box = over.getBoundingClientRect();
      return this.viewport.min + ((clientX - box.left) / box.width) * (this.viewport.max - this.viewport.min);
    };
    over.addEventListener(
      "wheel",
      (event) => {
        // A wheel over a chart that nobody asked anything of scrolls the page.
        const isZoom = event.ctrlKey || event.metaKey || this.frame.contains(document.activeElement);
        if (!event.shiftKey && Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
          this.viewport.pan(event.deltaX / over.clientWidth);
        } else if (event.shiftKey) this.viewport.pan((event.deltaX || event.deltaY) / over.clientWidth);
        else if (isZoom)
          this.viewport.zoom(Math.exp(Math.max(-0.5, Math.min(0.5, event.deltaY / 300))), at(event.clientX));
        else return;
        event.preventDefault();
      },
      { passive: false },
    );
    const pointers = new Map();
    over.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "touch" && !(event.shiftKey && event.button === 0)) return;
      pointers.set(event.pointerId, event.clientX);
      over.setPointerCapture(event.pointerId);
    });
    over.addEventListener("pointermove", (event) => {
      if (!pointers.has(event.pointerId)) return;
      const before = [...pointers.values()];
      pointers.set(event.pointerId, event.clientX);
      const after = [...pointers.values()];
      if (after.length === 1) this.viewport.pan((before[0] - after[0]) / over.clientWidth);
      else if (after.length === 2) {
        const [was, is] = [before, after].map(([a, b]) => Math.max(20, Math.abs(a - b)));
        this.viewport.zoom(was / is, at((after[0] + after[1]) / 2));
      }
    });
    for (const name of ["pointerup", "pointercancel"]) {
      over.addEventListener(name, (event) => pointers.delete(event.pointerId));
    }
  }

  #showLegend() {
    this.#values.clear();
    const listed = this.#series.filter((item) => item.isListed !== false);
    this.#legend.replaceChildren(
      ...listed.map((item) => {
        const value = element("b");
        this.#values.set(item, value);
        const swatch = element("span", { class: "swatch" });
        swatch.style.borderTopColor = `var(--${item.color})`;
        swatch.style.borderTopStyle =
          item.isPlain || item.dash?.[0] < 4 ? "dotted" : item.dash ? "dashed" : "solid";
        return element("li", {}, swatch, item.label, " ", value);
      }),
    );
    this.#showValues(this.#at);
  }

  /** Show the values at a progress; null: none. */
  #showValues(at) {
    this.#at = at;
    for (const [item, place] of this.#values) {
      place.textContent = at === null ? "" : valueText(item, at);
    }
    this.onCursor?.(at);
  }

  #showRemarks() {
    const left = this.isLog && this.#hasUnplaced() && "Not drawn: 0 and below, which a log axis has no place for.";
    const text = [left, this.remark()].filter(Boolean).join(" ");
    if (this.#remarks.textContent !== text) this.#remarks.textContent = text;
  }

  /** Return whether something of what is seen has no place on a logarithmic axis. */
  #hasUnplaced() {
    const { min, max } = this.viewport;
    return this.#series.some(({ x, y }) =>
      // Lines begin before what is seen, and end behind it.
      y
        .slice(Math.max(0, lowerBound(x, min) - 1), lowerBound(x, max) + 1)
        .some((value) => Number.isFinite(value) && value <= 0),
    );
  }

  #describe() {
    const text = this.describe();
    if (this.#canvas.getAttribute("aria-label") !== text) this.#canvas.setAttribute("aria-label", text);
  }

  #fillTable() {
    if (!this.#table) return;
    const listed = this.#series.filter((item) => item.isListed !== false);
    const { min, max } = this.viewport;
    const every = [...new Set(listed.flatMap((item) => (item.reads ?? item).x))]
      .filter((x) => x >= min && x <= max)
      .sort((a, b) => a - b);
    const stride = Math.ceil(every.length / MOST_ROWS) || 1;
    const rows = every.filter((_, index) => index % stride === 0);
    const shown =
      rows.length === every.length ? "" : `, one in ${count(stride)} of ${count(every.length)} points`;
    this.#table.replaceChildren(
      element(
        "table",
        { class: "data" },
        element("caption", { text: `${this.title}, progress ${count(min)} to ${count(max)}${shown}` }),
        element(
          "thead",
          {},
          element(
            "tr",
            {},
            [`progress (${this.unit()})`, ...listed.map((item) => item.label)].map((text) =>
              element("th", { scope: "col", class: "number", text }),
            ),
          ),
        ),
        element(
          "tbody",
          {},
          rows.map((x) =>
            element(
              "tr",
              {},
              element("th", { scope: "row", class: "number", text: count(x) }),
              listed.map((item) => element("td", { class: "number", text: valueText(item, x, true) })),
            ),
          ),
        ),
      ),
    );
  }
}

/**
 * Return the value of a series at a progress as text: straight between its points, or that of the
 * nearest one. Outside of its points there is none; `isExact`: nor between them.
 */
function valueText(item, at, isExact = false) {
  const { x, y } = item.reads ?? item;
  const place = Math.round(at);
  if (item.isStraight) {
    const value = valueAt(x, y, place);
    return value === null ? "–" : rate(value);
  }
  const index = nearest(x, place);
  const isThere = index >= 0 && (isExact ? x[index] === place : place >= x[0] && place <= x.at(-1));
  return isThere ? rate(y[index]) : "–";
}

/** Steps between ticks of progress, which is whole. */
const INCREMENTS = Array.from({ length: 16 }, (_, power) =>
  [1, 2, 5].map((digit) => digit * 10 ** power),
).flat();

/** Return how to write these ticks: with a letter for thousands and so on where that is exact enough. */
function xLabels(splits) {
  const short = splits.map(compact);
  const isExact = new Set(short).size === splits.length && short.every((text) => text.length <= 8);
  return isExact ? compact : count;
}
