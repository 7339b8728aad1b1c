// One run: how it is in words, then its curves, then what was done to it and why.

import { mountActions } from "./actions.js";
import { mountAdjustments } from "./adjustments.js";
import { RunContext } from "./context.js";
import { element, showError } from "./dom.js";
import { mountEvents } from "./events.js";
import { mountSpec } from "./spec.js";
import { mountSummary } from "./summary.js";

/**
 * What stands below the curves, in order: functions of (root, context), each of a module of its own,
 * which return how to end them, or nothing.
 */
const PANELS = [mountActions, mountAdjustments, mountEvents, mountSpec];

/** Show one run in `root`; return how to end it. */
export function mountRun(root, api, name) {
  const context = new RunContext(api, name);
  const top = element("div");
  const rest = element("div", { class: "stack" });
  root.append(top, rest);
  const ends = [];
  let isShown = false;

  const show = (run) => {
    context.setRun(run);
    if (isShown) return;
    isShown = true;
    for (const mount of [...PANELS]) {
      const place = element("div");
      rest.append(place);
      ends.push(mount(place, context) ?? (() => {}));
    }
  };
  const load = async () => {
    try {
      const run = await api.run(name);
      if (!isShown) top.replaceChildren();
      if (!isShown) ends.push(mountSummary(top, context));
      show(run);
    } catch (error) {
      if (isShown) return; // What is seen stays; the bar says that the server is away.
      showError(top, error, load);
    }
  };
  load();
  ends.push(
    api.streamRun(name, {
      // What was missed while it was away may be more than the stream sends: the spec, say.
      opened: (again) => again && load(),
      run: (run) => isShown && show(run),
      gone: () => showError(top, { message: `The run ${name} was deleted.` }),
    }),
  );
  return () => ends.forEach((end) => end());
}
