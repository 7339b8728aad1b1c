// The charts of a run: what is drawn, which stretch of it, and how it keeps up with the run.

import { addressOf, readAddress } from "./address.js";
import { Chart } from "./chart.js";
import {
  countingLosses,
  decode,
  forgottenLosses,
  longest,
  lowerBound,
  nonfiniteLosses,
  splice,
  splitAt,
  valueAt,
} from "./curves.js";
import { element, showError } from "./dom.js";
import { count, plural, rate } from "./format.js";
import { Markers, kindOf, placeOf } from "./markers.js";
import {
  paintAttempts,
  paintBands,
  paintForgotten,
  paintNonfinite,
  paintSelected,
  paintStageNames,
} from "./paint.js";
import { Viewport } from "./viewport.js";

/** How long the view must rest before finer data of it are asked for, and before the address says it. */
const SETTLED_MS = 150;
const NOTED_MS = 500;
/** Least time between two looks for newer points. */
const EVERY_MS = 700;
/** Groups drawn at most. */
const MOST_GROUPS = 8;
/** Margin left and right of a stretch for which finer data are asked, as a share of its width. */
const MARGIN = 0.5;
/** The share of what was trained that may leave the axis of losses where at least `seen` of it is shown. */
const FALL = { share: 0.1, seen: 0.3 };
const VALIDATION_COLORS = [2, 3, 5, 4, 1, 6];

/** Show the charts in `root`; return how to end them. */
export function mountFigures(root, context) {
  const figures = new Figures(root, context);
  return () => figures.destroy();
}

class Figures {
  #overview = null;
  /** Finer points of a stretch, `{ begin, end, curves }` with `curves.begin` and `.end`; null: none. */
  #detail = null;
  #shown = null;
  #nonfinite = [];
  #forgotten = [];
  #preview = null;
  #address = readAddress();
  #viewport = new Viewport();
  #charts = {};
  #markers = null;
  #ends = [];
  #timers = {};
  #wanted = null;
  #isAsking = false;
  #isOver = false;
  #plan = "";
  #zooming = null;

  constructor(root, context) {
    this.context = context;
    this.place = element("div", { class: "charts" });
    this.message = element("div");
    this.where = element("span", { class: "faint where" });
    this.groupPlace = element("div", {
      class: "groups",
      role: "group",
      "aria-label": "Parameter groups shown",
      hidden: true,
    });
    root.append(
      element(
        "section",
        { class: "panel figures", "aria-labelledby": "figures-title" },
        element(
          "div",
          { class: "toolbar" },
          element("h2", { id: "figures-title", text: "Curves" }),
          this.#buttons(),
          this.where,
        ),
        this.groupPlace,
        this.message,
        this.place,
        key(),
      ),
    );
    this.#makeCharts();
    this.#ends.push(
      context.onRun((run) => this.#runChanged(run)),
      context.onSelect((id) => this.#selected(id)),
      context.onRange((begin, end) => this.#viewport.show(begin, end)),
      context.onPreview((points) => {
        this.#preview = points;
        this.#draw();
      }),
      this.#viewport.onChange((byPerson) => this.#moved(byPerson)),
    );
    this.onPopState = () => {
      clearTimeout(this.#timers.note);
      const { groups } = this.#address;
      this.#address = readAddress();
      this.#applyAddress();
      if (String(groups) !== String(this.#address.groups)) this.#want("all");
    };
    addEventListener("popstate", this.onPopState);
    this.#want("all");
  }

  destroy() {
    this.#isOver = true;
    this.#zooming?.abort();
    for (const end of this.#ends) end();
    for (const timer of Object.values(this.#timers)) clearTimeout(timer);
    removeEventListener("popstate", this.onPopState);
    for (const chart of Object.values(this.#charts)) chart.destroy();
  }

  #buttons() {
    const view = this.#viewport;
    const button = (text, label, onclick, extra = {}) =>
      element("button", {
        class: "button small",
        type: "button",
        "aria-label": label,
        title: label,
        text,
        onclick,
        ...extra,
      });
    this.followButton = button(
      "Follow",
      "Follow: keep the newest in view",
      () => view.setFollow(view.follow === null),
      { "aria-pressed": "false" },
    );
    this.wholeButton = button("Whole run", "Show the whole run (key 0 on a chart, or double click)", () =>
      view.reset(),
    );
    return element(
      "div",
      { class: "buttons", role: "group", "aria-label": "What is seen" },
      button("◀", "Move to earlier progress", () => view.pan(-0.5)),
      button("▶", "Move to later progress", () => view.pan(0.5)),
      button("−", "Show more", () => view.zoom(2)),
      button("+", "Show less, closer", () => view.zoom(0.5)),
      this.wholeButton,
      this.followButton,
    );
  }

  #makeCharts() {
    const shared = {
      viewport: this.#viewport,
      unit: () => this.context.run?.unit ?? "progress",
      paintBelow: (chart, ctx) => paintBands(chart, ctx, this.#shown, this.#isFinished()),
    };
    const paintMore = (chart, ctx) => {
      paintAttempts(chart, ctx, this.#shown, false);
      paintSelected(chart, ctx, this.#selectedPlace());
    };
    const toggleLog = (name) => (isLog) => {
      if (isLog) this.#address.log.add(name);
      else this.#address.log.delete(name);
      this.#draw();
      this.#note();
    };
    this.#charts = {
      loss: new Chart({
        ...shared,
        title: "Loss",
        heights: [250, 210],
        top: 20,
        logToggle: toggleLog("loss"),
        fit: (begin, end) => this.#fitLoss(begin, end),
        describe: () => this.#tellLoss(),
        paint: (chart, ctx) => {
          paintStageNames(chart, ctx, this.#shown);
          paintAttempts(chart, ctx, this.#shown, true);
          paintNonfinite(chart, ctx, this.#nonfinite);
          paintSelected(chart, ctx, this.#selectedPlace());
          paintForgotten(chart, ctx, this.#forgotten);
        },
      }),
      lr: new Chart({
        ...shared,
        title: "Learning rate",
        heights: [220, 190],
        isZeroBased: true,
        logToggle: toggleLog("lr"),
        describe: () => this.#tellValues("lr"),
        remark: () => this.#tellOlder(),
        paint: paintMore,
      }),
      wd: new Chart({
        ...shared,
        title: "Weight decay",
        heights: [140, 130],
        isZeroBased: true,
        describe: () => this.#tellValues("wd"),
        paint: paintMore,
      }),
      norm: new Chart({
        ...shared,
        title: "Gradient norm",
        heights: [140, 130],
        isZeroBased: true,
        describe: () => this.#tellNorm(),
        paint: paintMore,
      }),
    };
    for (const chart of Object.values(this.#charts)) {
      chart.root.hidden = true;
      chart.onCursor = (at) => this.#showWhere(at);
    }
    this.#markers = new Markers(this.#charts.lr, this.context, (item) => this.#markerValue(item));
    this.place.append(...Object.values(this.#charts).map((chart) => chart.root));
  }

  // What is asked of the server.

  #runChanged(run) {
    if (run.state === "deleted") return;
    const plan = `${run.attempt} ${run.etag} ${run.state}`;
    if (this.#shown) {
      // The curves were asked for beside the first state of the run, which says how to draw them.
      if (!this.#plan) this.#combine();
      else if (plan !== this.#plan) this.#want("all");
      if (run.seq > this.#shown.seq) this.#want("newest");
    }
    this.#plan = plan;
    if (this.#shown) this.#showMarkers();
  }

  /** Ask for the whole run again, or for what is newer than what is shown: soon, and one at a time. */
  #want(what) {
    if (this.#wanted !== "all") this.#wanted = what;
    if (this.#isAsking || this.#timers.ask) return;
    const wait = this.#shown ? Math.max(0, (this.askedAt ?? 0) + EVERY_MS - performance.now()) : 0;
    this.#timers.ask = setTimeout(() => this.#ask(), wait);
  }

  async #ask() {
    this.#timers.ask = 0;
    const what = this.#shown ? this.#wanted : "all";
    this.#wanted = null;
    this.#isAsking = true;
    this.askedAt = performance.now();
    try {
      await (what === "all" ? this.#askAll() : this.#askNewest());
      this.message.replaceChildren();
    } catch (error) {
      // What is drawn stays: the bar says that the server is away, and a new run state asks again.
      if (!this.#isOver && !this.#shown) showError(this.message, error, () => this.#want("all"));
    }
    this.#isAsking = false;
    if (this.#wanted && !this.#isOver) this.#want(this.#wanted);
  }

  #points() {
    // Nothing is laid out yet when the first curves are asked for.
    const width = this.place.clientWidth || innerWidth;
    return Math.min(2000, Math.max(200, Math.ceil(width / 100) * 100));
  }

  async #curves(options) {
    const { api, name } = this.context;
    const { groups } = this.#address;
    try {
      return decode(await api.curves(name, { groups, ...options }));
    } catch (error) {
      // An address may name groups that the run no longer has, or never had.
      if (error.status !== 400 || !groups.length) throw error;
      this.#address.groups = [];
      return decode(await api.curves(name, options));
    }
  }

  async #askAll() {
    const isFirst = this.#shown === null;
    const detail = this.#detail;
    const [overview, finer] = await Promise.all([
      this.#curves({ points: this.#points() }),
      detail && this.#curves({ begin: detail.begin, end: detail.end, points: detail.points }),
    ]);
    if (this.#isOver) return;
    this.#overview = overview;
    if (finer && this.#detail === detail) this.#detail = { ...detail, curves: finer };
    this.#combine();
    if (isFirst) this.#applyAddress();
  }

  /** Ask for what is not final in what is shown, and all behind it. */
  async #askNewest() {
    const known = Math.min(this.#shown.progress, this.#lastLoss());
    const part = await this.#curves({ begin: Math.max(0, known), points: this.#points() });
    if (this.#isOver) return;
    if (newestAttempt(part) > newestAttempt(this.#shown) || longest(this.#overview) > 4 * this.#points()) {
      // Another attempt has opened; or so much was added that it is time to thin it out.
      await this.#askAll();
      return;
    }
    this.#overview = splice(this.#overview, part);
    if (this.#detail) this.#detail = { ...this.#detail, curves: splice(this.#detail.curves, part) };
    this.#combine();
  }

  /** Return the progress of the newest loss that is shown: from there on losses may have come. */
  #lastLoss() {
    const newest = this.#shown.losses.at(-1);
    return newest?.x.at(-1) ?? newest?.begin ?? 0;
  }

  async #askFiner() {
    const { min, max, range } = this.#viewport;
    if (!range || !this.#shown) {
      if (this.#detail) {
        this.#detail = null;
        this.#combine();
      }
      return;
    }
    const fine = this.#detail;
    const isFine =
      fine &&
      fine.begin <= min &&
      fine.end >= max &&
      fine.end - fine.begin <= 1.5 * (1 + 2 * MARGIN) * (max - min);
    if (isFine) {
      // Tables show what is seen.
      this.#draw();
      return;
    }
    const margin = MARGIN * (max - min);
    const begin = Math.max(0, Math.floor(min - margin));
    const end = Math.min(this.#viewport.bounds[1], Math.ceil(max + margin));
    const points = Math.min(4000, Math.round(this.#points() * (1 + 2 * MARGIN)));
    this.#zooming?.abort();
    this.#zooming = new AbortController();
    const { signal } = this.#zooming;
    try {
      const curves = await this.#curves({ begin, end, points, signal });
      if (this.#isOver || signal.aborted) return;
      this.#detail = { begin, end, points, curves };
      this.#combine();
    } catch {
      // Abandoned, or the server is away: the coarser points stay.
    }
  }

  /** Put together what is shown of what is known, and draw it. */
  #combine() {
    const fine = this.#detail;
    this.#shown = fine
      ? splice(this.#overview, { ...fine.curves, begin: fine.begin, end: fine.end })
      : this.#overview;
    this.#nonfinite = nonfiniteLosses(this.#shown);
    this.#forgotten = forgottenLosses(this.#shown);
    const { end, progress, horizon } = this.#shown;
    if (this.#isFinished()) this.#viewport.setBounds(progress, progress);
    else this.#viewport.setBounds(end, Math.max(horizon, progress));
    this.context.setCurves(this.#shown);
    this.#showGroups();
    this.#draw();
  }

  /** Return whether nothing comes any more, so that nothing is planned either. */
  #isFinished() {
    return this.context.run?.state === "finished";
  }

  // What is drawn.

  #draw() {
    const curves = this.#shown;
    if (!curves) return;
    const { loss, lr, wd, norm } = this.#charts;
    const { log } = this.#address;
    // A chart takes the width that it has once it is seen.
    loss.root.hidden = lr.root.hidden = false;
    wd.root.hidden = !curves.groups.some((group) => group.wd);
    norm.root.hidden = curves.norm.x.length === 0;
    loss.update(this.#lossSeries(), log.has("loss"));
    lr.update(this.#valueSeries("lr"), log.has("lr"));
    if (!wd.root.hidden) wd.update(this.#valueSeries("wd"));
    if (!norm.root.hidden)
      norm.update([{ key: "norm", label: "norm", color: "series-5", width: 1, ...curves.norm }]);
    this.#showMarkers();
  }

  #lossSeries() {
    const curves = this.#shown;
    return [
      { key: "raw", label: "loss", color: "raw", width: 1, ...countingLosses(curves) },
      { key: "smoothed", label: "smoothed", color: "series-0", width: 2.2, ...curves.smoothed },
      ...[...curves.validation].map(([name, curve], index) => ({
        key: `validation ${name}`,
        label: name,
        color: `series-${VALIDATION_COLORS[index % VALIDATION_COLORS.length]}`,
        width: 1.6,
        isPlain: true,
        ...curve,
      })),
    ];
  }

  /**
   * Return the least and greatest loss for the axis. The first tenth of what was trained, where a loss
   * falls fast, may leave it at the top: what came later would be a flat line otherwise.
   */
  #fitLoss(begin, end) {
    const { progress } = this.#shown;
    const from = end > FALL.seen * progress ? Math.max(begin, FALL.share * progress) : begin;
    const curves = [
      countingLosses(this.#shown),
      this.#shown.smoothed,
      ...this.#shown.validation.values(),
      ...this.#forgotten,
    ];
    const found = [Infinity, -Infinity];
    for (const { x, y } of curves) {
      for (let index = lowerBound(x, from); index < x.length && x[index] <= end; index += 1) {
        if (!Number.isFinite(y[index]) || (this.#address.log.has("loss") && y[index] <= 0)) continue;
        found[0] = Math.min(found[0], y[index]);
        found[1] = Math.max(found[1], y[index]);
      }
    }
    return found[0] <= found[1] ? found : null;
  }

  /** Return the series of "lr" or "wd": of each group past, planned and base, then a preview. */
  #valueSeries(name) {
    const curves = this.#shown;
    const series = [];
    for (const group of curves.groups) {
      if (!group[name]) continue;
      const label = group.name || (name === "lr" ? "LR" : "WD");
      const look = { color: `series-${this.#colorOf(group.name)}`, isStraight: true };
      const { past, planned } = splitAt(
        group.x,
        group[name],
        this.#isFinished() ? curves.progress : curves.horizon,
      );
      const whole = { x: group.x, y: group[name] };
      series.push({ key: `past ${group.name}`, label, width: 2.2, ...look, ...past, reads: whole });
      if (!this.#isFinished())
        series.push({
          key: `planned ${group.name}`,
          label: `${label}, planned`,
          width: 1.8,
          dash: [7, 5],
          ...look,
          ...planned,
          isListed: false,
        });
      if (name === "lr" && group.base.some((value, index) => value !== group.lr[index])) {
        series.push({
          key: `base ${group.name}`,
          label: `${label}, base schedule`,
          width: 1,
          dash: [1, 3],
          ...look,
          x: group.x,
          y: group.base,
          isListed: curves.groups.length === 1,
        });
      }
    }
    return [...series, ...this.#previewSeries(name)];
  }

  #previewSeries(name) {
    const points = this.#preview;
    if (!points?.length) return [];
    const [before, after] =
      name === "lr" ? ["before", "after"] : ["weight_decay_before", "weight_decay_after"];
    const names = (this.context.run?.values ?? []).map((value) => value.name);
    return this.#shown.groups.flatMap((group) => {
      const index = Math.max(0, names.indexOf(group.name));
      // What stays as it is needs no second line.
      const first = points.findIndex((point) => point[before][index] !== point[after][index]);
      if (first < 0) return [];
      const shown = points.slice(Math.max(0, first - 1));
      return [
        {
          key: `preview ${group.name}`,
          label: group.name ? `what if, ${group.name}` : "what if",
          color: "preview",
          width: 2,
          dash: [4, 3],
          isStraight: true,
          x: shown.map((point) => point.progress),
          y: shown.map((point) => point[after][index]),
        },
      ];
    });
  }

  #colorOf(name) {
    const names = (this.context.run?.values ?? []).map((value) => value.name);
    return Math.max(0, names.indexOf(name)) % MOST_GROUPS;
  }

  #showMarkers() {
    this.#markers.update(this.context.run?.adjustments ?? []);
  }

  #markerValue(item) {
    const group = this.#shown?.groups[0];
    if (!group) return null;
    const names = (this.context.run?.values ?? []).map((value) => value.name);
    const after = item.after?.[Math.max(0, names.indexOf(group.name))];
    if (after !== undefined && kindOf(item) !== "note" && kindOf(item) !== "directive") return after;
    return valueAt(group.x, group.lr, placeOf(item));
  }

  #selectedPlace() {
    const item = this.context.find(this.context.selected);
    return item ? placeOf(item) : null;
  }

  #selected(id) {
    const item = this.context.find(id);
    if (item) this.#viewport.reveal(placeOf(item));
    for (const chart of Object.values(this.#charts)) chart.redraw();
    this.#markers.place();
  }

  #showGroups() {
    const names = (this.context.run?.values ?? []).map((value) => value.name);
    this.groupPlace.hidden = names.length < 2;
    const shown = this.#shown.groups.map((group) => group.name);
    const now = JSON.stringify([names, shown]);
    if (now === this.groupsShown) return;
    this.groupsShown = now;
    const focused = [...this.groupPlace.querySelectorAll("button")].indexOf(document.activeElement);
    this.groupPlace.replaceChildren(
      element("span", { class: "faint", text: "Groups" }),
      ...names.map((name) => {
        const isOn = shown.includes(name);
        const swatch = element("span", { class: "swatch" });
        swatch.style.borderTopColor = `var(--series-${this.#colorOf(name)})`;
        return element(
          "button",
          {
            class: "button small",
            type: "button",
            "aria-pressed": String(isOn),
            disabled: !isOn && shown.length >= MOST_GROUPS,
            onclick: () => this.#toggleGroup(name),
          },
          swatch,
          name,
        );
      }),
    );
    if (focused >= 0) this.groupPlace.querySelectorAll("button")[focused]?.focus();
  }

  #toggleGroup(name) {
    const shown = this.#shown.groups.map((group) => group.name);
    const wanted = shown.includes(name) ? shown.filter((other) => other !== name) : [...shown, name];
    if (!wanted.length) return;
    this.#address.groups = wanted;
    this.#want("all");
    this.#note();
  }

  #showWhere(at) {
    const { min, max } = this.#viewport;
    this.where.textContent = at === null ? `${count(min)} to ${count(max)}` : `at ${count(Math.max(0, at))}`;
  }

  // The view, and the address that says it.

  #moved(byPerson) {
    const { range, follow } = this.#viewport;
    this.followButton.setAttribute("aria-pressed", follow !== null);
    this.wholeButton.setAttribute("aria-pressed", range === null);
    this.#showWhere(null);
    clearTimeout(this.#timers.finer);
    this.#timers.finer = setTimeout(() => this.#askFiner(), SETTLED_MS);
    if (byPerson) this.#note();
  }

  #applyAddress() {
    const { range, follow } = this.#address;
    this.#isApplying = true;
    if (follow !== null) this.#viewport.setFollow(true, follow);
    else if (range) this.#viewport.show(...range);
    else this.#viewport.reset();
    this.#isApplying = false;
    this.#draw();
  }

  #isApplying = false;

  /** Let the address say what is seen, once it rests; going back undoes it. */
  #note() {
    if (this.#isApplying) return;
    clearTimeout(this.#timers.note);
    this.#timers.note = setTimeout(() => {
      const { range, follow } = this.#viewport;
      const address = addressOf({ ...this.#address, range, follow });
      if (address !== location.pathname + location.search) history.pushState(null, "", address);
    }, NOTED_MS);
  }

  // The charts in words.

  #tellLoss() {
    const { x, y } = countingLosses(this.#shown);
    const finite = y.filter(Number.isFinite);
    if (!x.length) return "Loss: none was reported yet.";
    const least = finite.length ? `least ${rate(finite.reduce((a, b) => Math.min(a, b)))}, ` : "";
    const smoothed = this.#shown.smoothed.y.at(-1);
    const lost = this.#nonfinite.length
      ? ` ${plural(this.#nonfinite.length, "loss", "losses")} shown are not finite.`
      : "";
    return (
      `Loss over progress: ${least}newest ${rate(y.at(-1))} at ${count(x.at(-1))}` +
      (smoothed === undefined ? "." : `, smoothed ${rate(smoothed)}.`) +
      lost
    );
  }

  #tellValues(name) {
    const { groups, progress, horizon, end } = this.#shown;
    const told = groups
      .filter((group) => group[name])
      .slice(0, MOST_GROUPS)
      .map((group) => {
        const [now, last] = [progress, end].map((at) => rate(valueAt(group.x, group[name], at)));
        const later = this.#isFinished() ? "" : `, ${last} planned at ${count(end)}`;
        return `${group.name ? `${group.name}: ` : ""}${now} at ${count(progress)}${later}`;
      });
    const title = name === "lr" ? "Learning rate" : "Weight decay";
    return `${title} over progress, fixed below ${count(horizon)}. ${told.join("; ")}.`;
  }

  /** Return which adjustments have no marker. */
  #tellOlder() {
    const run = this.context.run;
    if (!run?.older_adjustments) return "";
    return (
      `Markers are those of the newest ${plural(run.adjustments.length, "adjustment")}; ` +
      `${plural(run.older_adjustments, "older one")} stand in the event log alone.`
    );
  }

  #tellNorm() {
    const { x, y } = this.#shown.norm;
    return x.length
      ? `Gradient norm over progress: newest ${rate(y.at(-1))} at ${count(x.at(-1))}.`
      : "Gradient norm: none.";
  }
}

function newestAttempt(curves) {
  return Math.max(0, ...curves.losses.map((item) => item.attempt));
}

/** Return what the marks on the charts mean. */
function key() {
  const mark = (kind, text) =>
    element(
      "li",
      {},
      element("span", { class: "marker still", dataset: { kind }, "aria-hidden": "true" }),
      text,
    );
  const line = (name, text) =>
    element("li", {}, element("span", { class: `sample ${name}`, "aria-hidden": "true" }), text);
  return element(
    "ul",
    { class: "key", "aria-label": "What the marks mean" },
    mark("change", "change"),
    mark("advice", "advice, not applied"),
    mark("directive", "directive"),
    mark("note", "note, expired or held back"),
    line("solid", "used"),
    line("fixed", "fixed ahead"),
    line("dashed", "planned"),
    line("dotted", "base schedule"),
    line("attempt", "attempt opened"),
    line("nonfinite", "loss not finite"),
  );
}
