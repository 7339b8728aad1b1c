// The top of a run's view: whether it is well, what was done last and why, what comes next.

import { nonfiniteLosses, valueAt } from "./curves.js";
import { badge, element } from "./dom.js";
import { count, duration, percent, plural, progressText, rate } from "./format.js";
import {
  changeSentence,
  lastChange,
  leaderText,
  lossText,
  nextOf,
  sinceText,
  stateOf,
  troublesOf,
} from "./words.js";

const CLOCK_MS = 1000;
/** Groups whose LR is told. */
const GROUPS = 3;
/** Over which time the pace is taken, at least and at most. */
const PACE = { least_ms: 20_000, longest_ms: 300_000 };

/** Show it in `root`; return how to end it. */
export function mountSummary(root, context) {
  const state = element("span");
  const since = element("span", { class: "faint" });
  const troubles = element("ul", { class: "troubles", "aria-label": "What needs someone" });
  const bar = element("progress", { "aria-label": "Progress of the run" });
  const facts = element("dl", { class: "facts" });
  const news = element("p", { class: "visually-hidden", role: "status" });
  root.append(
    element(
      "section",
      { class: "panel summary", "aria-labelledby": "run-name" },
      element("div", { class: "title" }, element("h1", { id: "run-name", text: context.name }), state, since),
      troubles,
      bar,
      facts,
      news,
    ),
  );

  const pace = new Pace();
  const showState = filler(state, ([word, tone]) => badge(tone, word));
  const showTroubles = filler(troubles, (found) => found.map((item) => trouble(item, context)));
  const showFacts = [];
  const show = () => {
    const { run, curves } = context;
    if (!run) return;
    const { word, tone } = stateOf(run);
    since.textContent = sinceText(run);
    const nonfinite = curves && run.nonfinite_losses ? nonfiniteLosses(curves).at(-1) : null;
    const found = troublesOf(run, nonfinite ?? null);
    bar.max = Math.max(1, run.total);
    bar.value = Math.min(run.progress, run.total);
    showState([word, tone]);
    showTroubles(found);
    troubles.hidden = found.length === 0;
    for (const [index, row] of factsOf(run, curves, pace.left(run)).entries()) {
      if (!showFacts[index]) {
        const place = element("div");
        facts.append(place);
        showFacts[index] = filler(place, fact);
      }
      showFacts[index](row);
    }
  };
  let known = null;
  const tellNews = (run) => {
    const items = run.adjustments ?? [];
    // Said to screen readers: what came since the page was opened.
    const fresh = known && items.filter((item) => !known.has(item.id));
    if (fresh?.length) news.textContent = fresh.map((item) => `New: ${changeSentence(item)}`).join(". ");
    known = new Set(items.map((item) => item.id));
  };
  const ends = [context.onRun(show), context.onRun(tellNews), context.onCurves(show)];
  const timer = setInterval(show, CLOCK_MS);
  return () => {
    for (const end of ends) end();
    clearInterval(timer);
  };
}

/** Return how to fill `place` with what `make` makes of a value; one that did not change leaves it alone. */
function filler(place, make) {
  let shown = null;
  return (value) => {
    const text = JSON.stringify(value);
    if (text === shown) return;
    shown = text;
    place.replaceChildren(...[make(value)].flat());
  };
}

function fact([name, text, detail]) {
  return [
    element("dt", { text: name }),
    element("dd", {}, text, Boolean(detail) && element("p", { class: "detail", text: detail })),
  ];
}

function trouble({ tone, text, detail, id }, context) {
  const said = id
    ? element("button", { class: "plain", type: "button", text, onclick: () => context.select(id) })
    : element("strong", { text });
  return element(
    "li",
    { class: "notice", dataset: { tone } },
    said,
    Boolean(detail) && element("p", { class: "detail", text: detail }),
  );
}

function factsOf(run, curves, left) {
  const last = lastChange(run);
  const next = nextOf(run, curves);
  const share = percent(run.total ? run.progress / run.total : 0);
  return [
    ["Progress", `${progressText(run)} (${share})${left}`],
    ["Loss", lossText(run)],
    ["LR now", rateText(run, curves)],
    ["Last change", last ? changeSentence(last) : "none: LR and WD follow the base schedule", last?.reason],
    ["Next", next.join("; ") || "nothing planned"],
    [
      "Attempt",
      run.attempt ? `${count(run.attempt)}, opened at ${count(run.begin)}` : "none yet",
      leaderText(run),
    ],
  ];
}

/** Return the LR of the first groups, and what share of the base schedule that is where it is one for all. */
function rateText(run, curves) {
  const values = run.values ?? [];
  const rates = values.slice(0, GROUPS).map((value) => `${value.name} ${rate(value.learning_rate)}`.trim());
  const more = values.length > GROUPS ? ` and ${plural(values.length - GROUPS, "group")} more` : "";
  const shares = (curves?.groups ?? []).map(({ x, lr, base }) => {
    const planned = valueAt(x, base, curves.progress);
    return planned ? percent(valueAt(x, lr, curves.progress) / planned) : null;
  });
  const isOne = shares.length > 0 && shares.every((share) => share !== null && share === shares[0]);
  return (
    rates.join(", ") + more + (isOne && shares[0] !== "100 %" ? ` (${shares[0]} of the base schedule)` : "")
  );
}

/** How long a run needs to its planned end, by the progress seen in the last minutes. */
class Pace {
  #seen = [];

  /** Return it in words, empty where it is not known. */
  left(run, now = performance.now()) {
    if (this.#seen.at(-1)?.attempt !== run.attempt) this.#seen = [];
    if (this.#seen.at(-1)?.progress !== run.progress)
      this.#seen.push({ attempt: run.attempt, progress: run.progress, now });
    this.#seen = this.#seen.filter((item) => now - item.now < PACE.longest_ms);
    const first = this.#seen[0];
    const last = this.#seen.at(-1);
    if (run.state !== "running" || !first || last.now - first.now < PACE.least_ms) return "";
    const pace = (1000 * (last.progress - first.progress)) / (now - first.now);
    return pace > 0 && run.total > run.progress
      ? `, ${duration((run.total - run.progress) / pace)} left at ${rate(pace, 2)} a second`
      : "";
  }
}
