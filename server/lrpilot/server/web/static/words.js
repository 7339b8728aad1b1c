// What is to be said of a run: whether it is well, what lrpilot did last and why, what it will do.
// The words and thresholds are those of deploy/grafana/states.py.

import { nowMs } from "./clock.js";
import { lowerBound } from "./curves.js";
import { ago, changeText, count, duration, plural, rate, secondsSince, toNumber } from "./format.js";

const WAIT_S = 15;
const SILENT_S = 900;

/** Share of a run's losses that counts as lately, and the fewest and most losses. */
const LATELY = { share: 0.02, least: 50, most: 1000 };

/** How many times steeper than what is beside it a step of the LR is. */
const STEEP = 5;

/** Planned changes that are told one by one. */
const MOST_PLANNED = 2;

/** Status of adjustments that change nothing (any more), so that they are no news. */
const PASSED = new Set(["advice", "expired", "held back", "forgotten", "undone", "approved"]);

/** Return the state of a run: `{ word, tone }`. */
export function stateOf(run, now = nowMs()) {
  if (run.state === "unreadable") return { word: "unreadable", tone: "bad" };
  if (isOver(run)) return { word: run.state, tone: "faint" };
  if (run.forgotten) return { word: "log forgot", tone: "bad" };
  if (run.state === "created") return { word: "created", tone: "faint" };
  if (run.imported_from) return { word: "imported", tone: "info" };
  if (waits(run)) return { word: "ranks wait", tone: "bad" };
  if (isSilent(run, now)) return { word: "is silent", tone: "warn" };
  if (isQuiet(run, now)) return { word: "at its end", tone: "faint" };
  if (run.held) return { word: "is held", tone: "info" };
  return { word: "trains", tone: "ok" };
}

/** A run that was finished or deleted does nothing more. */
function isOver(run) {
  return run.state === "finished" || run.state === "deleted";
}

function waits(run) {
  return Boolean(run.ranks && run.ranks.waiting > 0 && run.ranks.blocked_s > WAIT_S);
}

function isQuiet(run, now) {
  return run.state === "running" && secondsSince(run.updated_at, now) > SILENT_S;
}

/** A job that has reached the end of its plan has nothing more to say. */
function isSilent(run, now) {
  return isQuiet(run, now) && !(run.progress >= run.total);
}

/** Return the advice that waits for an answer, oldest first. */
export function pendingAdvice(run) {
  return (run.adjustments ?? []).filter((item) => item.status === "advice" && item.action !== "note");
}

/** Return the directives that the trainers have not answered, or not as they should. */
function troubledDirectives(run) {
  const troubled = new Set(["asked", "failed", "unhandled"]);
  return (run.adjustments ?? []).filter(
    (item) => item.action === "directive" && troubled.has(item.status) && !item.forgotten,
  );
}

/**
 * Return what needs someone, worst first: a list of `{ tone, text, detail, id }`, `id` of the
 * adjustment that it is about or null. `nonfiniteAt`: progress of the newest loss that is not finite, null: none.
 */
export function troublesOf(run, nonfiniteAt = null, now = nowMs()) {
  const found = [];
  const add = (tone, text, detail = "", id = null) => found.push({ tone, text, detail, id });
  if (run.state === "deleted") return found;
  if (run.forgotten) add("bad", run.forgotten);
  if (run.state === "finished") return found;
  if (waits(run)) {
    const calls = plural(run.ranks.waiting, "rank waits", "ranks wait");
    add("bad", `${calls} for values; training stands still for ${duration(run.ranks.blocked_s)}.`);
  }
  if (nonfiniteAt !== null && isLately(run, nonfiniteAt)) {
    add(
      "bad",
      `The loss was not finite at ${count(nonfiniteAt)}; ${count(run.nonfinite_losses)} such in all.`,
    );
  }
  if (isSilent(run, now))
    add("warn", `Nothing was recorded for ${duration(secondsSince(run.updated_at, now))}.`);
  for (const item of troubledDirectives(run)) {
    const said = { asked: "has no answer yet", failed: "failed", unhandled: "was handled by nobody" }[
      item.status
    ];
    const tone = item.status === "asked" ? "warn" : "bad";
    add(tone, `Directive due at ${count(item.effective)} ${said}: ${item.summary}`, item.reason, item.id);
  }
  const advice = pendingAdvice(run);
  const newest = advice.at(-1);
  if (newest) {
    const what = `${newest.summary}, by ${madeBy(newest)}`;
    const until = newest.expires ? ` until ${count(newest.expires)}` : "";
    const text =
      advice.length === 1
        ? `Advice waits for an answer${until}: ${what}`
        : `${advice.length} pieces of advice wait for an answer, the newest${until}: ${what}`;
    add("warn", text, newest.reason, newest.id);
  }
  if (run.held) add("info", "LR and WD are held: they stay as they are until a release.");
  if (run.imported_from)
    add("info", `Imported from ${run.imported_from}: its job goes on here from its checkpoint.`);
  return found;
}

function isLately(run, progress) {
  const losses = Math.min(LATELY.most, Math.max(LATELY.least, LATELY.share * run.losses));
  const stride = Math.max(1, run.progress / Math.max(1, run.losses));
  return progress >= run.frontier - losses * stride;
}

/** Return the newest change that lrpilot made, which may be planned still; null: there was none. */
export function lastChange(run) {
  const changes = (run.adjustments ?? []).filter(
    (item) => !item.forgotten && item.action !== "note" && !PASSED.has(item.status),
  );
  return changes.at(-1) ?? null;
}

/** Return who made an adjustment: a policy, or a person. */
export function madeBy(item) {
  return item.author || item.source.replace(/^(?:(?:stages\.\d+\.)?policies\.\d+|detector) \((.+)\)$/, "$1");
}

/** Return one adjustment in a sentence: "LR × 0.5 at 30,120 by plateau, LR 2e-4 → 1e-4". */
export function changeSentence(item) {
  return `${item.summary} at ${count(item.effective)} by ${madeBy(item)}: ${changeText(item)}`;
}

/** Return the loss in words: "2.31, smoothed 2.29". */
export function lossText(run) {
  if (toNumber(run.loss) === null) return "none yet";
  const smoothed = toNumber(run.smoothed_loss) === null ? "" : `, smoothed ${rate(run.smoothed_loss)}`;
  return `${rate(run.loss)}${smoothed}`;
}

/**
 * Return what comes next, as a list of phrases, soonest first: planned adjustments, the next stage,
 * where the LR turns. `curves`: as `decode` has them, null: not there yet.
 */
export function nextOf(run, curves) {
  if (isOver(run)) return [];
  const planned = (run.adjustments ?? []).filter(
    (item) => item.status === "planned" && !item.forgotten && item.action !== "note",
  );
  const found = planned
    .slice(0, MOST_PLANNED)
    .map((item) => [item.effective, `${item.summary} at ${count(item.effective)} by ${madeBy(item)}`]);
  if (planned.length > MOST_PLANNED) {
    const more = planned.slice(MOST_PLANNED);
    found.push([
      more[0].effective,
      `${plural(more.length, "more change")} until ${count(more.at(-1).effective)}`,
    ]);
  }
  const stage = (curves?.stages ?? []).find((item) => item.begin > run.progress);
  if (stage) found.push([stage.begin, `stage ${stage.name} at ${count(stage.begin)}`]);
  // Between planned changes the LR turns at each of them.
  const turn = curves && !planned.length ? nextTurn(curves) : null;
  if (turn) found.push(turn);
  return found.sort(([one], [other]) => one - other).map(([, text]) => text);
}

/** Return where the planned LR of the first group turns, `[progress, phrase]`; null: nowhere. */
function nextTurn({ groups, progress }) {
  const group = groups[0];
  if (!group) return null;
  const { x, lr } = group;
  let trend = null;
  for (let index = Math.max(1, lowerBound(x, progress)); index < x.length; index += 1) {
    if (x[index - 1] >= progress && isStep(x, lr, index)) {
      return [x[index], `LR goes to ${rate(lr[index])} at ${count(x[index])}`];
    }
    const here = trendOf(lr[index - 1], lr[index]);
    const at = x[index - 1];
    if (trend !== null && here !== trend) {
      return [at, `LR ${here}${here === "stays" ? ` at ${rate(lr[index])}` : ""} from ${count(at)} on`];
    }
    trend = here;
  }
  if (trend === null) return null;
  return [
    x.at(-1),
    `LR ${trend} ${trend === "stays" ? "at" : "to"} ${rate(lr.at(-1))} until the planned end at ${count(x.at(-1))}`,
  ];
}

/** Return whether a curve jumps to the point at `index`: within one unit, and far more than next to it. */
function isStep(x, y, index) {
  const slope = (at) => (at > 0 && at < x.length ? Math.abs(y[at] - y[at - 1]) / (x[at] - x[at - 1]) : 0);
  const here = slope(index);
  return x[index] - x[index - 1] === 1 && here > STEEP * slope(index - 1) && here > STEEP * slope(index + 1);
}

function trendOf(before, after) {
  if (Math.abs(after - before) <= 1e-12 * Math.max(Math.abs(before), Math.abs(after))) return "stays";
  return after > before ? "rises" : "falls";
}

/** Return how far a job in leader mode may go on without the server, and over what it last did; "": another mode. */
export function leaderText(run) {
  if (!run.leader) return "";
  const may = run.permitted ? `may go on alone below ${count(run.permitted)}` : "may not go on alone yet";
  const last = run.declaration;
  const did = last
    ? `; it did so for ${plural(run.declared_steps, "step")}, last from ${count(last.begin)} to ${count(last.end)}`
    : "";
  return `Leader mode: the job ${may}${did}.`;
}

/** Return when the run last did something, in words. */
export function sinceText(run, now = nowMs()) {
  const what = run.state === "finished" ? "finished" : "last event";
  return run.updated_at ? `${what} ${ago(run.updated_at, now)}` : "";
}
