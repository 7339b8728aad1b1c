// How the ranks keep up: who is behind, and who waits.

import { element, panel } from "./dom.js";
import { count, duration, plural } from "./format.js";

/** Show it in `root`; return how to end it. */
export function mountRanks(root, context) {
  const text = element("p");
  const body = element("tbody");
  const head = ["rank", "progress", "behind", "asked"].map((name, index) =>
    element("th", { scope: "col", class: index ? "number" : "", text: name }),
  );
  const table = element(
    "div",
    { class: "scroll" },
    element(
      "table",
      { class: "data narrow" },
      element("caption", { class: "visually-hidden", text: "The ranks farthest behind" }),
      element("thead", {}, element("tr", {}, head)),
      body,
    ),
  );
  root.append(panel("Ranks", text, table));
  return context.onRun((run) => {
    const { ranks } = run;
    table.hidden = !ranks?.slowest?.length;
    if (!ranks) {
      text.textContent =
        run.state === "running"
          ? "None asked this server within the last two minutes."
          : "None asks: no attempt is open.";
      return;
    }
    const waits = ranks.waiting
      ? `${plural(ranks.waiting, "call waits", "calls wait")} for values, for ${duration(ranks.blocked_s)}.`
      : "None waits.";
    text.textContent = `${plural(ranks.active, "rank")} asked within the last two minutes. ${waits}`;
    body.replaceChildren(
      ...ranks.slowest.map((rank) =>
        element(
          "tr",
          {},
          element("th", { scope: "row", text: String(rank.rank) }),
          [count(rank.progress), rank.lag ? count(rank.lag) : "–", `${duration(rank.asked_s_ago)} ago`].map(
            (cell) => element("td", { class: "number", text: cell }),
          ),
        ),
      ),
    );
  });
}
