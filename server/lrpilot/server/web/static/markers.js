// Adjustments, advice and directives on a chart: buttons that say what each is, and select it.

import { element } from "./dom.js";
import { changeText, count, plural } from "./format.js";
import { madeBy } from "./words.js";

/** Pixels within which markers become one. */
const NEAR = 13;
/** Adjustments told of a marker that stands for several. */
const LISTED = 4;
/** Letters of a reason here; the list has all of it. */
const MOST_LETTERS = 400;
/** Kinds, those first that somebody looks for: where several are one marker it has the first one's look. */
const RANKS = ["advice", "change", "directive", "note", "passed"];

/** Return what kind of marker an adjustment gets. */
export function kindOf(item) {
  if (item.forgotten || item.status === "undone" || item.status === "forgotten") return "passed";
  if (item.action === "note") return "note";
  if (item.action === "directive") return "directive";
  if (item.mode === "advise") return item.status === "advice" ? "advice" : "note";
  if (item.status === "held back") return "note";
  return "change";
}

/** Return where an adjustment stands on the axis of progress. */
export function placeOf(item) {
  return item.action === "note" ? item.decided_at : item.effective;
}

/** The markers on one chart; they lie in its overlay. */
export class Markers {
  #items = [];
  #clusters = [];
  #buttons = [];
  #current = 0;
  #tip = element("div", { class: "tip", role: "tooltip", id: "marker-tip", hidden: true });
  #strip = element("div", {
    class: "markers",
    role: "toolbar",
    "aria-label": "Adjustments and advice on the learning rate: left and right arrow go from one to the next",
  });

  /** `valueOf(item)`: where it stands on the axis of the chart, null: at the bottom. */
  constructor(chart, context, valueOf) {
    Object.assign(this, { chart, context, valueOf });
    chart.overlay.append(this.#strip, this.#tip);
    this.#strip.addEventListener("keydown", (event) => this.#key(event));
    chart.onPlaced = () => this.place();
  }

  /** Show these adjustments. */
  update(items) {
    this.#items = items;
    this.place();
  }

  /** Put every marker where the chart has its progress now. */
  place() {
    const placed = this.#items
      .map((item) => ({ item, at: this.chart.place(placeOf(item), this.valueOf(item)) }))
      .filter(({ at }) => at)
      .sort((a, b) => a.at[0] - b.at[0]);
    const clusters = [];
    for (const { item, at } of placed) {
      const near = clusters.findLast(
        (other) => Math.abs(other.at[0] - at[0]) < NEAR && Math.abs(other.at[1] - at[1]) < NEAR,
      );
      if (near) near.items.push(item);
      else clusters.push({ items: [item], at });
    }
    this.#show(clusters);
  }

  #show(clusters) {
    const names = JSON.stringify(clusters.map(({ items }) => items.map((item) => [item.id, item.status])));
    const isSame = names === this.#names;
    this.#names = names;
    this.#clusters = clusters;
    if (!isSame) this.#rebuild();
    clusters.forEach(({ at, items }, index) => {
      const button = this.#buttons[index];
      button.style.left = `${at[0]}px`;
      button.style.top = `${at[1]}px`;
      const isSelected = items.some((item) => item.id === this.context.selected);
      button.setAttribute("aria-pressed", isSelected);
    });
  }

  #names = "";

  #rebuild() {
    const focused = this.#buttons.indexOf(document.activeElement);
    const before = focused < 0 ? null : this.#buttons[focused].dataset.id;
    this.#hide();
    this.#buttons = this.#clusters.map((cluster, index) => this.#button(cluster, index));
    this.#strip.replaceChildren(...this.#buttons);
    this.#current = Math.min(this.#current, Math.max(0, this.#buttons.length - 1));
    this.#rove(this.#current);
    const again = this.#buttons.find((button) => button.dataset.id === before);
    again?.focus();
  }

  #button({ items }, index) {
    const first = items.toSorted((a, b) => RANKS.indexOf(kindOf(a)) - RANKS.indexOf(kindOf(b)))[0];
    const text = items.length > 1 ? plural(items.length, "adjustment") : titleOf(first);
    const button = element("button", {
      class: "marker",
      type: "button",
      tabindex: -1,
      dataset: { kind: kindOf(first), id: first.id, many: items.length > 1 ? items.length : "" },
      "aria-label":
        items.length > 1
          ? `${text}, the last: ${linesOf(items.at(-1)).join(". ")}`
          : linesOf(first).join(". "),
      "aria-describedby": "marker-tip",
      text: items.length > 1 ? String(items.length) : "",
      onclick: () => this.#chosen(index),
      onpointerenter: () => this.#tell(index),
      onpointerleave: () => this.#hide(),
      onfocus: () => {
        this.#rove(index);
        this.#tell(index);
      },
      onblur: () => this.#hide(),
    });
    return button;
  }

  #chosen(index) {
    const { items } = this.#clusters[index];
    const places = items.map(placeOf);
    const width = Math.max(...places) - Math.min(...places);
    const { viewport } = this.chart;
    if (items.length > 1 && width > 0 && viewport.max - viewport.min > 2 * width + 8) {
      viewport.show(
        Math.min(...places) - Math.max(2, width / 2),
        Math.max(...places) + Math.max(2, width / 2),
      );
    } else this.context.select(items.at(-1).id);
  }

  #key(event) {
    const last = this.#buttons.length - 1;
    const to = { ArrowRight: this.#current + 1, ArrowLeft: this.#current - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.#hide();
    if (to === undefined) return;
    event.preventDefault();
    this.#buttons[Math.min(last, Math.max(0, to))]?.focus();
  }

  /** Let Tab lead to one marker alone: there may be hundreds. */
  #rove(index) {
    this.#buttons[this.#current]?.setAttribute("tabindex", -1);
    this.#current = index;
    this.#buttons[index]?.setAttribute("tabindex", 0);
  }

  #tell(index) {
    const { items, at } = this.#clusters[index];
    const shown = items.length > 1 ? items.slice(-LISTED).reverse() : items;
    this.#tip.replaceChildren(
      ...shown.flatMap((item) => {
        const [title, ...lines] = linesOf(item);
        const rest = items.length > 1 ? lines.slice(0, 2) : lines;
        return [element("strong", { text: title }), ...rest.map((text) => element("p", { text }))];
      }),
      ...(items.length > LISTED
        ? [element("p", { class: "faint", text: `and ${items.length - LISTED} more` })]
        : []),
    );
    this.#tip.hidden = false;
    const { clientWidth, clientHeight } = this.chart.overlay;
    const left = Math.min(
      Math.max(at[0] - this.#tip.offsetWidth / 2, 0),
      Math.max(0, clientWidth - this.#tip.offsetWidth),
    );
    this.#tip.style.left = `${left}px`;
    const isLow = at[1] > clientHeight / 2;
    this.#tip.style.top = isLow ? "" : `${at[1] + 14}px`;
    this.#tip.style.bottom = isLow ? `${clientHeight - at[1] + 14}px` : "";
  }

  #hide() {
    this.#tip.hidden = true;
  }
}

function titleOf(item) {
  return `${item.id}: ${item.summary}`;
}

/** Return what is said of an adjustment, a line each: what, where and by whom, the change, why, how it stands. */
function linesOf(item) {
  const isNote = item.action === "note";
  return [
    titleOf(item),
    isNote
      ? `at ${count(item.decided_at)}, by ${madeBy(item)}`
      : `from ${count(item.effective)} on, by ${madeBy(item)}${item.decided_at ? `, on the loss at ${count(item.decided_at)}` : ""}`,
    ...(isNote || item.action === "directive" ? [] : [changeText(item)]),
    item.reason.length > MOST_LETTERS ? `${item.reason.slice(0, MOST_LETTERS)}…` : item.reason,
    statusText(item),
  ].filter(Boolean);
}

/** Return how it stands, in words. */
function statusText(item) {
  if (item.action === "note") return "a note: it changes nothing";
  if (item.action === "directive")
    return item.status === "asked" ? "the trainers have not answered yet" : `directive ${item.status}`;
  if (item.status === "advice")
    return item.expires
      ? `advice: can be approved while the horizon is below ${count(item.expires)}`
      : "advice";
  return item.status;
}
