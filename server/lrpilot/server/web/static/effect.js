// What a change does to a run: the answer of a dry run, as `lrpilot run … --dry-run` shows it.

import { element } from "./dom.js";
import { count, rate } from "./format.js";

/** Where values are shown: shares of the way from the first changed progress to the end. */
const SHARES = [0, 0.01, 0.1, 0.5, 1];

/** Most names of groups in a cell. */
const MOST_NAMES = 3;

/** Return the points of a preview that the table shows, in order, each once. */
export function shownPoints(preview, effective) {
  const points = preview.filter((point) => point.progress >= effective);
  if (points.length === 0) return [];
  const begin = points[0].progress;
  const end = points.at(-1).progress;
  const nearest = (wanted) =>
    points.reduce((best, point) =>
      Math.abs(point.progress - wanted) < Math.abs(best.progress - wanted) ? point : best,
    );
  return [...new Set(SHARES.map((share) => nearest(begin + share * (end - begin))))];
}

/** Return the groups of a preview as `{ name, index }`; those that are alike all along as one. */
export function alikeGroups(names, preview) {
  const groups = Math.max(0, ...preview.map((point) => Math.max(point.before.length, point.after.length)));
  const alike = new Map();
  for (let index = 0; index < groups; index++) {
    const key = JSON.stringify(
      preview.map((point) => [
        point.before[index],
        point.after[index],
        point.weight_decay_before[index],
        point.weight_decay_after[index],
      ]),
    );
    // Before the first attempt a change may bring groups that the run does not have yet.
    const name = names[index] ?? `group ${index}`;
    if (!alike.has(key)) alike.set(key, { index, names: [] });
    alike.get(key).names.push(name);
  }
  return [...alike.values()].map(({ index, names }) => ({ index, name: groupText(names) }));
}

/** Return a table of LR and WD before and after, at the points that say most. */
export function valueTable(answer) {
  const points = shownPoints(answer.preview, answer.effective);
  const groups = alikeGroups(
    answer.run.values.map((values) => values.name),
    answer.preview,
  );
  const named = groups.length > 1 || groups.some((group) => group.name !== "");
  const decayed = points.some(
    (point) => point.weight_decay_before.length > 0 || point.weight_decay_after.length > 0,
  );
  const headings = ["progress", named && "group", "learning rate", decayed && "weight decay"];
  return element(
    "table",
    { class: "data values" },
    element("caption", { class: "visually-hidden", text: "Learning rate and weight decay before and after" }),
    element(
      "thead",
      {},
      element(
        "tr",
        {},
        headings.filter(Boolean).map((text) => element("th", { scope: "col", text })),
      ),
    ),
    element(
      "tbody",
      {},
      points.map((point) =>
        groups.map((group, place) =>
          element(
            "tr",
            {},
            place === 0 &&
              element("th", { scope: "rowgroup", rowspan: groups.length, text: count(point.progress) }),
            named && element("td", { text: group.name || "all" }),
            element("td", {}, change(point.before[group.index], point.after[group.index])),
            decayed &&
              element(
                "td",
                {},
                change(
                  point.weight_decay_before[group.index],
                  point.weight_decay_after[group.index],
                ),
              ),
          ),
        ),
      ),
    ),
  );
}

/** Return a list of the changed fields of the spec. */
export function changeList(changes) {
  return element(
    "ul",
    { class: "changes" },
    changes.map((item) =>
      element(
        "li",
        {},
        element("code", { text: item.field }),
        ": ",
        element("del", { text: item.before }),
        " → ",
        element("ins", { text: item.after }),
      ),
    ),
  );
}

/** Return a value before and after, once where it is the same; undefined: there is none. */
function change(before, after) {
  const text = (value) => (value === undefined ? "none" : rate(value));
  if (before === after) return [text(after)];
  return [element("span", { class: "old", text: text(before) }), " → ", element("strong", { text: text(after) })];
}

function groupText(names) {
  const shown = names.slice(0, MOST_NAMES).join(", ");
  const more = names.length - MOST_NAMES;
  return more > 0 ? `${shown} and ${more} more` : shown;
}
