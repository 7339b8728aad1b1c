// What people can change about a run from the page, and how they do it elsewhere.

import { ADJUSTMENTS, CHANGES } from "./changes.js";
import { ChangeDialog } from "./dialog.js";
import { element, panel } from "./dom.js";

/** Return whether changes of a run can be made here; `server` null: it is not known yet. */
export function mayChange(server, run) {
  return server !== null && !server.read_only && ["created", "running"].includes(run.state);
}

/** Return the command line that makes a change; `more`: what follows the name of the run. */
export function commandLine(kind, name, ...more) {
  const [command, ...options] = CHANGES[kind].words;
  return ["lrpilot", "run", command, name, ...options, ...more, "--reason", "…"].join(" ");
}

/** Return a button that opens the dialog of a change; `item`: the adjustment or advice that it is about. */
export function changeButton(context, kind, item = null) {
  const { button } = CHANGES[kind];
  return element("button", {
    class: "button small",
    type: "button",
    dataset: { role: kind },
    text: button,
    "aria-label": item ? `${button} ${item.summary}, ${item.id}` : null,
    onclick: () => new ChangeDialog(context, [kind], item),
  });
}

/** Show in `root` what can be done to a run; return how to end it. */
export function mountActions(root, context) {
  const buttons = element("div", { class: "acts" });
  const why = element("div", { class: "faint" });
  const said = element("p", { class: "said", role: "status" });
  const place = panel("Change this run", buttons, why, said);
  place.classList.add("actions");
  root.append(place);
  let server = null;
  let shown = "";

  const show = () => {
    const run = context.run;
    if (server === null || run === null) return;
    const kinds = offered(run);
    const text = JSON.stringify([server, run.state, kinds]);
    if (text === shown) return;
    shown = text;
    const can = mayChange(server, run);
    const focused = buttons.contains(document.activeElement);
    buttons.hidden = !can;
    buttons.replaceChildren(
      ...(can ? kinds.map((kind) => changeButton(context, kind)) : []),
      ...(can
        ? [
            element("button", {
              class: "button small",
              type: "button",
              dataset: { role: "adjust" },
              text: "Adjust…",
              onclick: () => new ChangeDialog(context, ADJUSTMENTS),
            }),
          ]
        : []),
    );
    // What had the focus is another button now.
    if (focused) buttons.querySelector("button")?.focus();
    why.hidden = can;
    why.replaceChildren(...(can ? [] : whyNot(server, run, kinds)));
  };
  const look = () => {
    const known = context.api.server;
    if (known === null || known === server) return;
    server = known;
    show();
  };
  const stops = [
    context.onRun(show),
    context.onSaid((text) => {
      said.textContent = text;
      // What opened the dialog may be gone, and the focus with it.
      if (document.activeElement === document.body) buttons.querySelector("button")?.focus();
    }),
    context.api.connection.onChange(look),
  ];
  context.api.serverInfo().then(look, () => {}); // The bar says it where there is no answer.
  return () => stops.forEach((stop) => stop());
}

/** Return which of hold and release has something to do. */
function offered(run) {
  const holds = run.adjustments.filter(
    (item) => item.action === "hold" && ["planned", "in force"].includes(item.status) && !item.forgotten,
  );
  const isHeldByHand = holds.some((item) => item.source === "operator");
  return [!isHeldByHand && "hold", (run.held || holds.length > 0) && "release"].filter(Boolean);
}

function whyNot(server, run, kinds) {
  if (run.state === "finished") return ["The run is finished: its plan no longer changes."];
  if (run.state === "deleted") return ["The run was deleted."];
  if (run.state === "unreadable") return ["The log of the run cannot be read."];
  const lines = [...kinds, ...ADJUSTMENTS].map((kind) => commandLine(kind, run.name));
  return [
    element("p", { text: `Read-only: ${server.why_read_only}` }),
    element(
      "details",
      {},
      element("summary", { text: "On the command line (from another machine with --server HOST:PORT)" }),
      element("pre", {}, element("code", { text: lines.join("\n") })),
    ),
  ];
}
