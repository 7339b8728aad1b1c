// The spec of a run: the one in force, and what every revision changed.

import { excerpt, lineDiff } from "./diff.js";
import { element, panel, showError } from "./dom.js";
import { changeList } from "./effect.js";
import { count, plural, utc } from "./format.js";

/** How long the button says that the text was copied, in milliseconds. */
const SAID_MS = 2_000;

const SIGNS = { "-": "before", "+": "after", "@": "", " ": "" };

/** Show the spec of a run and its history in `root`; return how to end it. */
export function mountSpec(root, context) {
  return new SpecPanel(root, context).end;
}

class SpecPanel {
  #context;
  #plan = null;
  #isBusy = false;
  #text = "";
  #timer = 0;
  #isOver = false;
  #stop;

  constructor(root, context) {
    this.#context = context;
    this.failure = element("div", {});
    this.pending = element("div", {});
    this.code = element("code", {});
    this.copy = element("button", {
      class: "button small",
      type: "button",
      text: "Copy",
      onclick: () => this.#copy(),
    });
    this.history = element("div", { class: "revisions" });
    this.place = panel(
      "Spec",
      this.failure,
      this.pending,
      element(
        "div",
        { class: "spec-head" },
        element("h3", { id: "spec-in-force", text: "In force" }),
        this.copy,
      ),
      // It scrolls, so that it must take the focus.
      element("pre", { class: "yaml", tabindex: "0", "aria-labelledby": "spec-in-force" }, this.code),
      this.history,
    );
    root.append(this.place);
    this.#stop = context.onRun((run) => this.#follow(run));
  }

  end = () => {
    this.#isOver = true;
    clearTimeout(this.#timer);
    this.#stop();
  };

  #follow(run) {
    // A new spec is a new plan, save for one that waits: it comes with the next attempt.
    const plan = `${run.etag} ${run.attempt} ${run.attempt ? "" : run.seq}`;
    if (plan === this.#plan || this.#isBusy) return;
    this.#plan = plan;
    this.#load();
  }

  async #load() {
    this.#isBusy = true;
    try {
      const answer = await this.#context.api.specs(this.#context.name);
      if (this.#isOver) return;
      this.failure.replaceChildren();
      this.#show(answer);
    } catch (error) {
      if (!this.#isOver) showError(this.failure, error, () => this.#load());
      return;
    } finally {
      this.#isBusy = false;
    }
    this.#follow(this.#context.run);
  }

  #show({ specs, pending, left_out: leftOut }) {
    const text = specs.at(-1)?.spec_document ?? "";
    if (text !== this.#text) {
      this.#text = text;
      this.code.replaceChildren(...coloured(text));
    }
    this.pending.replaceChildren();
    if (pending) {
      this.pending.append(
        element("h3", { text: "Begins with the next attempt" }),
        changeList(pending.changes),
        differenceOf(text, pending.spec_document),
      );
    }
    // What somebody unfolded or folded stays so; the newest one is unfolded when it comes.
    const known = new Map(
      [...this.history.querySelectorAll("details")].map((item) => [Number(item.dataset.seq), item.open]),
    );
    const lines = specs.map((spec, index) =>
      index === 0
        ? element("p", {
            class: "faint",
            text: leftOut ? `${plural(leftOut + 1, "older spec")}: the event log has them` : `The first spec, ${signature(spec)}`,
          })
        : revisionOf(
            spec,
            specs[index - 1].spec_document,
            known.get(spec.seq) ?? index === specs.length - 1,
          ),
    );
    this.history.replaceChildren(
      element("h3", { text: `History: ${plural(specs.length - 1 + leftOut, "revision")}` }),
      ...lines.reverse(),
    );
  }

  async #copy() {
    let text = "Copied";
    try {
      // Not there on a page that came over plain HTTP from another machine.
      await navigator.clipboard.writeText(this.#text);
    } catch {
      getSelection().selectAllChildren(this.code);
      text = "Selected: copy with Ctrl+C";
    }
    this.copy.textContent = text;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.copy.textContent = "Copy";
    }, SAID_MS);
  }
}

function revisionOf(spec, before, isOpen) {
  return element(
    "details",
    { class: "revision", open: isOpen, dataset: { seq: spec.seq } },
    element(
      "summary",
      {},
      element("strong", { text: `from ${count(spec.effective)} on` }),
      ` · ${spec.changes.map((item) => item.field).join(", ") || "no field differs"}`,
      element("span", { class: "faint", text: ` · ${signature(spec)}` }),
      spec.reason && [": ", element("q", { text: spec.reason })],
    ),
    changeList(spec.changes),
    differenceOf(before, spec.spec_document),
  );
}

function signature(spec) {
  const who = spec.author || (spec.by_trainer ? "a trainer" : "");
  // What the log has packed away has no time here.
  const parts = [who && `by ${who}`, spec.recorded_at && utc(spec.recorded_at), `event ${count(spec.seq)}`];
  return parts.filter(Boolean).join(", ");
}

function differenceOf(before, after) {
  const lines = excerpt(lineDiff(before.trimEnd(), after.trimEnd()));
  return element(
    "pre",
    { class: "diff", tabindex: "0", "aria-label": "Difference of the specs, line by line" },
    lines.map(({ sign, text }) =>
      element(
        { "-": "del", "+": "ins" }[sign] ?? "span",
        { class: sign === "@" ? "gap" : null, title: SIGNS[sign] || null },
        `${sign === "@" ? "⋯" : sign} ${text}`,
      ),
    ),
  );
}

/** Return a YAML document as nodes: keys apart from values. */
function coloured(text) {
  return text.split(/(?<=\n)/).map((line) => {
    const [, indent, key, rest] = line.match(/^([\s-]*)([\w.-]+:)?(.*)$/s);
    return element("span", {}, indent, key ? element("span", { class: "yaml-key", text: key }) : null, rest);
  });
}
