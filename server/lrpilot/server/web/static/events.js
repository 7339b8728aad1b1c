// The event log of a run, the newest event first.

import { element, panel, showError } from "./dom.js";
import { changeText, count, plural, rate, utc } from "./format.js";

const PAGE = 50;

/** Most events of a page of the server. */
const MOST_NEW = 1_000;

/** Events that may come while those before them are under way. */
const MARGIN = 100;

/** Most events in the list; beyond it the list begins anew, with its newest page. */
const MOST_SHOWN = 5_000;

/** Least time between two looks for new events, in milliseconds. */
const LOOK_EVERY_MS = 1_000;

/** Most pages read for one press of the button: where little is notable a page may have nothing. */
const MOST_PAGES = 20;

/** Statuses that a line leaves out, as the command line does. */
const USUAL = new Set(["planned", "in force", "ended", "noted", ""]);

/** Kinds of events that are about no progress. */
const NOWHERE = new Set(["created", "attached", "joined", "finished", "imported"]);

/** Show the event log of a run in `root`; return how to end it. */
export function mountEvents(root, context) {
  return new EventLog(root, context).end;
}

/** Return whether an event is more than what every step brings, as ListEvents has it. */
function isNotable(event) {
  const isUsual = ["reported", "recorded"].includes(event.kind) && event.adjustments.length === 0;
  return !isUsual && event.kind !== "permitted";
}

class EventLog {
  #context;
  /** Sequence number up to which events are here, or were found not to be notable; 0: not read yet. */
  #seq = 0;
  #token = "";
  #timer = 0;
  #lookedMs = 0;
  #isBusy = false;
  #loads = 0;
  #stops = [];

  constructor(root, context) {
    this.#context = context;
    this.all = element("input", { type: "checkbox", id: "events-all", onchange: () => this.#turn() });
    this.all.checked = new URLSearchParams(location.search).get("events") === "all";
    this.list = element("ol", { class: "events" });
    this.failure = element("div", {});
    this.more = element("button", {
      class: "button",
      type: "button",
      text: "Show older events",
      hidden: true,
      onclick: () => this.#readOlder(),
    });
    this.note = element("p", { class: "faint", role: "status", text: "loading…" });
    this.place = panel(
      "Event log",
      element(
        "p",
        { class: "switch" },
        this.all,
        element("label", { for: "events-all", text: "all events, with each report and record of values" }),
      ),
      this.list,
      this.note,
      this.failure,
      this.more,
    );
    root.append(this.place);
    this.#load();
    this.#stops.push(context.onRun((run) => this.#follow(run)));
    const follow = () => context.run && this.#follow(context.run);
    document.addEventListener("visibilitychange", follow);
    this.#stops.push(() => document.removeEventListener("visibilitychange", follow));
  }

  end = () => {
    this.#loads += 1;
    clearTimeout(this.#timer);
    for (const stop of this.#stops) stop();
  };

  #turn() {
    const address = new URL(location.href);
    if (this.all.checked) address.searchParams.set("events", "all");
    else address.searchParams.delete("events");
    history.replaceState(history.state, "", address);
    this.#load();
  }

  /** Read the newest page in place of what is shown. */
  async #load() {
    const mine = ++this.#loads;
    // What comes while the page is under way is read afterwards: events that are here twice are not.
    const known = this.#context.run?.seq ?? 0;
    this.#isBusy = true;
    try {
      const { events, token } = await this.#read("", mine);
      if (mine !== this.#loads) return;
      this.list.replaceChildren(...events.map((event) => this.#line(event)));
      this.#seq = Math.max(known, events[0]?.seq ?? 0);
      this.#token = token;
      this.#done();
    } catch (error) {
      this.#failed(error, mine, () => this.#load());
    }
  }

  async #readOlder() {
    const mine = this.#loads;
    if (this.#isBusy) return;
    this.#isBusy = true;
    this.more.setAttribute("aria-busy", "true");
    try {
      const { events, token } = await this.#read(this.#token, mine);
      if (mine !== this.#loads) return;
      const lines = events.map((event) => this.#line(event));
      this.list.append(...lines);
      this.#token = token;
      this.#done();
      // Who reads with the keyboard goes on with what came.
      if (lines.length > 0) lines[0].focus({ preventScroll: true });
    } catch (error) {
      this.#failed(error, mine, () => this.#readOlder());
    }
  }

  /** Read pages until there is an event, or none is left. */
  async #read(token, mine) {
    for (let pages = 0; ; pages++) {
      const answer = await this.#context.api.events(this.#context.name, {
        pageToken: token,
        pageSize: PAGE,
        newestFirst: true,
        notable: !this.all.checked,
      });
      token = answer.next_page_token;
      const isEnough = answer.events.length > 0 || !token || pages >= MOST_PAGES;
      if (isEnough || mine !== this.#loads) return { events: answer.events, token };
    }
  }

  #follow(run) {
    if (run.seq <= this.#seq || this.#isBusy || this.#timer || document.hidden) return;
    const wait = Math.max(0, this.#lookedMs + LOOK_EVERY_MS - performance.now());
    this.#timer = setTimeout(() => {
      this.#timer = 0;
      this.#readNew(this.#context.run.seq);
    }, wait);
  }

  /** Read the events since the last look: those alone, whatever of them is notable. */
  async #readNew(seq) {
    const mine = this.#loads;
    const missing = seq - this.#seq;
    this.#lookedMs = performance.now();
    if (this.#isBusy || missing <= 0) return;
    if (missing + MARGIN > MOST_NEW || this.list.childElementCount + missing > MOST_SHOWN) {
      this.#load();
      return;
    }
    this.#isBusy = true;
    try {
      const { events } = await this.#context.api.events(this.#context.name, {
        pageSize: missing + MARGIN,
        newestFirst: true,
      });
      if (mine !== this.#loads) return;
      const isWhole = events.length > 0 && events.at(-1).seq <= this.#seq + 1;
      if (!isWhole) {
        // A page may end early, and the log may have grown by more meanwhile.
        this.#load();
        return;
      }
      const wanted = events.filter(
        (event) => event.seq > this.#seq && (this.all.checked || isNotable(event)),
      );
      this.list.prepend(...wanted.map((event) => this.#line(event)));
      this.#seq = events[0].seq;
      this.#done();
    } catch (error) {
      this.#failed(error, mine, () => this.#load());
    }
  }

  #done() {
    this.#isBusy = false;
    this.failure.replaceChildren();
    this.more.removeAttribute("aria-busy");
    this.more.hidden = !this.#token;
    this.note.textContent = this.list.childElementCount === 0 ? "No events yet." : "";
    if (this.#context.run) this.#follow(this.#context.run);
  }

  #failed(error, mine, retry) {
    if (mine !== this.#loads) return;
    this.#isBusy = false;
    this.more.removeAttribute("aria-busy");
    this.note.textContent = "";
    showError(this.failure, error, retry);
  }

  #line(event) {
    return element(
      "li",
      { tabindex: "-1", dataset: { seq: event.seq, kind: event.kind } },
      element(
        "p",
        { class: "event" },
        element("time", { datetime: event.recorded_at, text: utc(event.recorded_at) }),
        element("span", { class: "seq", title: "sequence number in the log", text: count(event.seq) }),
        element("span", { class: "kind", text: event.kind }),
        element("span", {
          class: "at",
          title: "progress",
          text: NOWHERE.has(event.kind) ? "" : count(event.progress),
        }),
        element(
          "span",
          { class: "text" },
          event.summary,
          event.losses.length > 0 && `; ${lossText(event.losses)}`,
          event.author && element("span", { class: "who", text: `, by ${event.author}` }),
          event.reason && [": ", element("q", { text: event.reason })],
        ),
      ),
      event.adjustments.length > 0 &&
        element("ul", { class: "decided" }, event.adjustments.map((item) => this.#decided(item, event))),
    );
  }

  #decided(item, event) {
    const status = USUAL.has(item.status) ? "" : ` (${item.status})`;
    const text =
      event.kind === "adjusted"
        ? // The line above has said the rest.
          `: ${changeText(item)}${status}`
        : ` ${item.source} at ${count(item.decided_at)}: ${item.summary}${status} from ` +
          `${count(item.effective)} on, ${changeText(item)}: ${item.reason}`;
    return element(
      "li",
      { class: item.forgotten ? "dimmed" : null },
      element("button", {
        class: "pick",
        type: "button",
        text: item.id,
        title: "Show it on the charts",
        onclick: () => this.#context.select(item.id),
      }),
      text,
    );
  }
}

/** Return the losses of a report as the command line has them. */
function lossText(losses) {
  const text = (item) => (item.loss === null ? "none" : rate(item.loss));
  const shown = losses.length === 1 ? text(losses[0]) : `${text(losses[0])} … ${text(losses.at(-1))}`;
  const notes = [
    [losses.filter((item) => item.late).length, "late"],
    [losses.filter((item) => item.skipped).length, "skipped"],
  ].filter(([number]) => number > 0);
  const validation = Object.assign({}, ...losses.map((item) => item.validation_losses));
  const named = Object.entries(validation).map(([name, value]) => `${name} ${rate(value)}`);
  return [
    `${losses.length === 1 ? "loss" : plural(losses.length, "loss", "losses")} ${shown}` +
      (notes.length > 0 ? ` (${notes.map(([number, word]) => `${count(number)} ${word}`).join(", ")})` : ""),
    ...named.sort(),
  ].join(", ");
}
