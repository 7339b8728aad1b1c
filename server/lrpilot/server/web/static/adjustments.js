// What changed the plan of a run, what would if somebody approved it, and what was asked of its trainers.

import { changeButton, commandLine, mayChange } from "./actions.js";
import { mayBeUndone } from "./changes.js";
import { badge, element, panel } from "./dom.js";
import { arrow, changeText, count, plural, rate } from "./format.js";
import { madeBy, pendingAdvice } from "./words.js";

/** Items shown at first, and more with each press of the button. */
const STEP = 10;

/** Least time between two looks at what an advice would do, in milliseconds: the horizon moves. */
const LOOK_EVERY_MS = 10_000;

const TONES = {
  planned: "info",
  "in force": "ok",
  advice: "warn",
  approved: "ok",
  asked: "info",
  done: "ok",
  failed: "bad",
  unhandled: "warn",
};

const DIMMED = new Set(["forgotten", "undone", "expired"]);

/** Show the adjustments of a run in `root`; return how to end it. */
export function mountAdjustments(root, context) {
  return new Adjustments(root, context).end;
}

class Adjustments {
  #context;
  #server = null;
  #items = new Map();
  #most = STEP;
  /** Id of the advice whose what-if is drawn; null: none. */
  #wondered = null;
  /** Whether somebody has chosen what is drawn; until then it is the newest advice. */
  #isChosen = false;
  #lookedMs = -Infinity;
  #lookedHorizon = -1;
  #looks = 0;
  #stops = [];

  constructor(root, context) {
    this.#context = context;
    this.list = element("ol", { class: "adjustments" });
    this.more = element("button", {
      class: "button",
      type: "button",
      hidden: true,
      onclick: () => this.#showMore(),
    });
    this.note = element("p", { class: "faint", role: "status" });
    this.older = element("p", { class: "faint older", hidden: true });
    this.place = panel("Adjustments and advice", this.note, this.list, this.more, this.older);
    root.append(this.place);
    this.#stops.push(context.onRun((run) => this.#show(run)));
    this.#stops.push(context.onSelect((id) => this.#mark(id, true)));
    const readAddress = () => context.select(new URLSearchParams(location.search).get("adjustment"));
    addEventListener("popstate", readAddress);
    this.#stops.push(() => removeEventListener("popstate", readAddress));
    readAddress();
    context.api.serverInfo().then(
      (server) => {
        this.#server = server;
        this.#redraw();
      },
      () => {}, // The bar above says it; what can be done shows once the server answers.
    );
  }

  end = () => {
    this.#looks += 1;
    this.#context.preview(null);
    for (const stop of this.#stops) stop();
  };

  #redraw() {
    if (this.#context.run) this.#show(this.#context.run);
  }

  #show(run) {
    const newest = [...run.adjustments].reverse();
    const selected = this.#context.selected;
    const place = newest.findIndex((item) => item.id === selected);
    if (place >= this.#most) this.#most = place + 1;
    const shown = newest.slice(0, this.#most);
    const known = new Set(shown.map((item) => item.id));
    for (const [id, { line }] of this.#items) {
      if (known.has(id)) continue;
      line.remove();
      this.#items.delete(id);
    }
    let next = this.list.firstChild;
    for (const item of shown) {
      const line = this.#line(item, run);
      if (line === next) next = next.nextSibling;
      else this.list.insertBefore(line, next);
    }
    this.more.hidden = newest.length <= this.#most;
    this.more.textContent = `Show ${plural(newest.length - this.#most, "older one")}`;
    this.older.hidden = !run.older_adjustments;
    setText(this.older, `The event log has ${plural(run.older_adjustments, "older one")}, not shown here.`);
    let note = "";
    if (newest.length === 0) note = "None so far: LR and WD follow the base schedule.";
    else if (selected && place < 0) {
      note = `${selected} is not among the newest ones, which are here; the event log has all.`;
    }
    setText(this.note, note);
    this.note.hidden = !note;
    this.#mark(selected, false);
    this.#wonder(run);
  }

  #showMore() {
    const first = this.#most;
    this.#most += STEP;
    this.#redraw();
    this.list.children[first]?.querySelector("button")?.focus();
  }

  /** Return the line of an item; one that is the same as before stays, with what is unfolded in it. */
  #line(item, run) {
    // Of an advice the time that is left changes with the horizon.
    const left = isPending(item) ? item.expires - run.horizon : 0;
    const drawn = this.#wondered === item.id;
    const text = JSON.stringify([item, left > 0, drawn, mayChange(this.#server, run), this.#server]);
    const known = this.#items.get(item.id);
    if (known?.text === text) {
      if (left > 0) setText(known.left, leftText(item, run));
      return known.line;
    }
    const entry = { text, left: element("span", { class: "left" }) };
    entry.line = known?.line ?? element("li", { dataset: { id: item.id } });
    const focused = entry.line.contains(document.activeElement)
      ? document.activeElement.dataset.role
      : null;
    entry.line.replaceChildren(...this.#parts(item, run, entry.left));
    entry.line.classList.toggle("dimmed", DIMMED.has(item.status));
    if (focused) entry.line.querySelector(`[data-role="${focused}"]`)?.focus();
    this.#items.set(item.id, entry);
    return entry.line;
  }

  #parts(item, run, left) {
    const names = run.values.map((values) => values.name);
    if (isPending(item)) setText(left, leftText(item, run));
    return [
      element(
        "div",
        { class: "what" },
        badge(TONES[item.status] ?? "faint", item.status === "asked" ? "no answer yet" : item.status),
        element("button", {
          class: "pick",
          type: "button",
          "aria-pressed": "false",
          dataset: { role: "pick" },
          text: item.summary,
          onclick: () => this.#pick(item.id),
        }),
        element("span", { text: `from ${count(item.effective)} on` }),
        item.action !== "directive" && element("span", { class: "faint", text: changeText(item) }),
        this.#acts(item, run),
      ),
      item.reason && element("p", { class: "why", text: item.reason }),
      foldedGroups(item, names, [
        `${madeBy(item)} at ${count(item.decided_at)} · `,
        element("code", { text: item.id }),
        isPending(item) && [" · ", left],
      ]),
    ].filter(Boolean);
  }

  #acts(item, run) {
    const acts = [];
    if (isPending(item)) {
      const drawn = this.#wondered === item.id;
      acts.push(
        element("button", {
          class: "button small",
          type: "button",
          "aria-pressed": String(drawn),
          dataset: { role: "wonder" },
          text: "What if",
          title: "Draw on the charts what approving it now would do",
          onclick: () => this.#choose(drawn ? null : item.id),
        }),
      );
      if (mayChange(this.#server, run)) acts.push(changeButton(this.#context, "approve", item));
      else if (this.#server?.read_only) {
        acts.push(element("code", { text: commandLine("approve", this.#context.name, item.id) }));
      }
    }
    if (mayBeUndone(item) && mayChange(this.#server, run)) {
      acts.push(changeButton(this.#context, "undo", item));
    }
    return acts.length > 0 && element("span", { class: "acts" }, acts);
  }

  #pick(id) {
    this.#context.select(this.#context.selected === id ? null : id);
  }

  /** Show what is selected, here and in the address. */
  #mark(id, isNew) {
    for (const [known, { line }] of this.#items) {
      const isSelected = known === id;
      line.classList.toggle("selected", isSelected);
      line.querySelector(".pick").setAttribute("aria-pressed", String(isSelected));
    }
    if (!isNew) return;
    const address = new URL(location.href);
    if (id) address.searchParams.set("adjustment", id);
    else address.searchParams.delete("adjustment");
    if (address.href !== location.href) history.replaceState(history.state, "", address);
    if (!id || !this.#context.run) return;
    if (!this.#items.has(id)) this.#redraw();
    this.#items.get(id)?.line.scrollIntoView({ block: "nearest" });
  }

  #choose(id) {
    this.#isChosen = true;
    this.#drawWhatIf(id);
    this.#redraw();
  }

  #drawWhatIf(id) {
    this.#wondered = id;
    this.#lookedHorizon = -1;
    this.#lookedMs = -Infinity;
    this.#looks += 1;
    if (id === null) this.#context.preview(null);
  }

  /** Keep the drawing of what an advice would do up to date. */
  #wonder(run) {
    const pending = pendingAdvice(run).reverse();
    if (this.#wondered !== null && !pending.some((item) => item.id === this.#wondered)) {
      this.#isChosen = false;
      this.#drawWhatIf(null);
    }
    if (this.#wondered === null && !this.#isChosen && pending.length > 0) {
      this.#drawWhatIf(pending[0].id);
      this.#line(pending[0], run);
      this.#mark(this.#context.selected, false);
    }
    const isDue = run.horizon !== this.#lookedHorizon && performance.now() - this.#lookedMs > LOOK_EVERY_MS;
    if (this.#wondered === null || !isDue) return;
    this.#lookedHorizon = run.horizon;
    this.#lookedMs = performance.now();
    this.#look(this.#wondered);
  }

  async #look(id) {
    const mine = ++this.#looks;
    try {
      const { author } = await this.#context.api.serverInfo();
      const wish = { advice: id, dry_run: true, author: author || "page" };
      const answer = await this.#context.api.approve(this.#context.name, wish);
      if (mine === this.#looks) this.#context.preview(answer.preview);
    } catch {
      // It expired meanwhile, or the server is away: the next state of the run tells.
      if (mine === this.#looks) this.#context.preview(null);
    }
  }
}

function isPending(item) {
  return pendingAdvice({ adjustments: [item] }).length > 0;
}

function leftText(item, run) {
  const left = item.expires - run.horizon;
  return left > 0
    ? `can be approved for ${count(left)} more ${run.unit}, while the horizon is below ${count(item.expires)}`
    : "can no longer be approved";
}

/** Return a line with the values of all groups folded under it; the line alone where the first says all. */
function foldedGroups(item, names, line) {
  const groups = Math.max(item.before.length, item.after.length);
  const isChanged =
    String(item.before) !== String(item.after) ||
    String(item.weight_decay_before) !== String(item.weight_decay_after);
  if (groups < 2 || !isChanged) return element("p", { class: "faint" }, line);
  const decayed = item.weight_decay_after.length > 0;
  return element(
    "details",
    {},
    element("summary", { class: "faint" }, line, ` · ${plural(groups, "group")}`),
    element(
      "table",
      { class: "data values" },
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          ["group", "learning rate", decayed && "weight decay"]
            .filter(Boolean)
            .map((text) => element("th", { scope: "col", text })),
        ),
      ),
      element(
        "tbody",
        {},
        item.after.map((after, index) =>
          element(
            "tr",
            {},
            element("th", { scope: "row", text: names[index] || `group ${index}` }),
            element("td", { text: valueText(item.before[index], after) }),
            decayed &&
              element("td", {
                text: valueText(item.weight_decay_before[index], item.weight_decay_after[index]),
              }),
          ),
        ),
      ),
    ),
  );
}

function valueText(before, after) {
  return before === undefined || after === undefined ? rate(after ?? before) : arrow(before, after);
}

function setText(place, text) {
  if (place.textContent !== text) place.textContent = text;
}
