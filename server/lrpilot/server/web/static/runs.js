// All runs.

import { element, panel, showError } from "./dom.js";
import { progressText } from "./format.js";

/** Show the list of runs in `root`; return how to end it. */
export function mountRuns(root, api) {
  const list = element("ul");
  const place = panel("Runs", list);
  root.append(place);
  const fill = async () => {
    try {
      const { runs } = await api.runs();
      list.replaceChildren(
        ...runs.map((run) =>
          element(
            "li",
            {},
            element("a", { href: `/runs/${encodeURIComponent(run.name)}`, text: run.name }),
            ` ${run.state}, ${progressText(run)}`,
          ),
        ),
      );
    } catch (error) {
      showError(list, error, fill);
    }
  };
  fill();
  return api.streamRuns({ runs: fill });
}
