// One run: how it is in words, then its curves, then what was done to it and why.

import { mountActions } from "./actions.js";
import { mountAdjustments } from "./adjustments.js";
import { RunContext } from "./context.js";
import { element, showError } from "./dom.js";
import { mountEvents } from "./events.js";
import { mountFigures } from "./figures.js";
import { mountRanks } from "./ranks.js";
import { mountSpec } from "./spec.js";
import { mountSummary } from "./summary.js";

/**
 * What stands below the curves, in order: functions of (root, context), each of a module of its own,
 * which return how to end them, or nothing. They are called once the run is known.
 */
const PANELS = [mountAdjustments, mountRanks, mountEvents, mountSpec];

/** Show one run in `root`; return how to end it. */
export function mountRun(root, api, name) {
  const context = new RunContext(api, name);
  const message = element("div");
  const view = element("div", { class: "stack", hidden: true });
  root.append(message, view);
  const ends = [];
  let isOver = false;
  let leave = () => {};
  const mount = (part) => {
    const place = element("div");
    view.append(place);
    ends.push(part(place, context) ?? (() => {}));
  };
  // The curves are asked for at the same time as the run.
  mount(mountSummary);
  mount(mountActions);
  mount(mountFigures);

  const show = (run) => {
    const isFirst = context.run === null;
    message.replaceChildren();
    view.hidden = false;
    context.setRun(run);
    if (!isFirst) return;
    PANELS.forEach(mount);
    leave = api.streamRun(name, {
      // What was missed while it was away may be more than the stream sends: the spec, say.
      opened: (again) => again && load(),
      // There is none for a run that was deleted meanwhile.
      failed: () => load(),
      run: show,
      gone,
    });
    ends.push(leave);
  };
  const gone = () => {
    leave();
    // The stream may have ended without a word: the server is there all the same.
    api.look().catch(() => {});
    context.setRun({ ...context.run, state: "deleted", ranks: null });
    const text = `The run ${name} was deleted. What is below is its last state.`;
    showError(message, { message: text }, () => location.reload());
  };
  const load = async () => {
    try {
      const run = await api.run(name);
      if (!isOver) show(run);
    } catch (error) {
      if (isOver) return;
      if (context.run === null) showError(message, error, load);
      else if (error.reason === "RunNotFound") gone();
      // Else what is seen stays: the bar says that the server is away.
    }
  };
  load();
  return () => {
    isOver = true;
    ends.forEach((end) => end());
  };
}
