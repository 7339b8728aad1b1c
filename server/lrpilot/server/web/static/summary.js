// The top of a run's view: whether it is well, what was done last and why, what comes next.

import { badge, element } from "./dom.js";
import { count, percent, plural, progressText, rate } from "./format.js";
import { changeSentence, lastChange, lossText, nextOf, sinceText, stateOf, troublesOf } from "./words.js";

const CLOCK_MS = 1000;

/** Show it in `root`; return how to end it. */
export function mountSummary(root, context) {
  const state = element("span");
  const since = element("span", { class: "faint" });
  const troubles = element("ul", { class: "troubles", "aria-label": "What needs someone" });
  const bar = element("progress", { "aria-label": "Progress of the run" });
  const facts = element("dl", { class: "facts" });
  root.append(
    element(
      "section",
      { class: "panel summary", "aria-labelledby": "run-name" },
      element("div", { class: "title" }, element("h1", { id: "run-name", text: context.name }), state, since),
      troubles,
      bar,
      facts,
    ),
  );

  let said = "";
  const show = () => {
    const run = context.run;
    const { word, tone } = stateOf(run);
    since.textContent = sinceText(run);
    const found = troublesOf(run);
    bar.max = Math.max(1, run.total);
    bar.value = Math.min(run.progress, run.total);
    const rows = factsOf(run, null);
    // Only what changed is touched: a screen reader, and a selection of text, keep their place.
    const now = JSON.stringify([word, found, rows]);
    if (now === said) return;
    said = now;
    state.replaceChildren(badge(tone, word));
    troubles.replaceChildren(...found.map((item) => trouble(item, context)));
    troubles.hidden = found.length === 0;
    facts.replaceChildren(
      ...rows.flatMap(([name, text]) => [element("dt", { text: name }), element("dd", { text })]),
    );
  };
  const end = context.onRun(show);
  const timer = setInterval(show, CLOCK_MS);
  return () => {
    end();
    clearInterval(timer);
  };
}

function trouble(item, context) {
  const text = item.id
    ? element("button", { class: "plain", type: "button", text: item.text, onclick: () => context.select(item.id) })
    : item.text;
  return element("li", { class: "notice", dataset: { tone: item.tone } }, text);
}

function factsOf(run, curves) {
  if (run.state === "unreadable") return [];
  const last = lastChange(run);
  const next = nextOf(run, curves);
  const rates = (run.values ?? []).map((value) => (value.name ? `${value.name} ` : "") + rate(value.learning_rate));
  return [
    ["Progress", `${progressText(run)} (${percent(run.total ? run.progress / run.total : 0)})`],
    ["Loss", lossText(run)],
    ["LR now", rates.slice(0, 3).join(", ") + (rates.length > 3 ? ` and ${plural(rates.length - 3, "group")} more` : "")],
    ["Last", last ? `${changeSentence(last)}. ${last.reason}` : "lrpilot changed nothing yet"],
    ["Next", next.join("; ") || "nothing planned"],
    ["Attempt", run.attempt ? `${count(run.attempt)}, opened at ${count(run.begin)}` : "none yet"],
  ];
}
