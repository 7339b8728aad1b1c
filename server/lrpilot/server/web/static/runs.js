// All runs: where each stands, and who needs somebody first.

import { nowMs } from "./clock.js";
import { badge, element, showError } from "./dom.js";
import { ago, count, percent, plural, rate, toNumber, utc } from "./format.js";
import { sparkline } from "./sparkline.js";
import { stateOf } from "./words.js";

/** How often times and what follows from them are looked at again, in milliseconds. */
const TICK_MS = 5_000;

/** Most points of a sparkline; where it grows beyond, every other one goes. */
const MOST_POINTS = 120;

/** The words for states, in the order in which somebody is needed. */
const STATES = [
  "log forgot",
  "unreadable",
  "ranks wait",
  "is silent",
  "is held",
  "trains",
  "imported",
  "created",
  "at its end",
  "finished",
];

/** The columns by their names in the address; `of` gives what is compared. */
const COLUMNS = [
  { name: "state", title: "State", of: (row) => row.urgency },
  { name: "name", title: "Run", of: (row) => row.run.name },
  { name: "progress", title: "Progress", of: (row) => share(row.run) },
  { name: "lr", title: "LR", of: (row) => toNumber(row.run.values?.[0]?.learning_rate) },
  { name: "loss", title: "Loss", of: (row) => toNumber(row.run.loss) },
  { name: "trend", title: "Loss so far" },
  { name: "advice", title: "Advice", of: (row) => row.run.pending_advice ?? 0 },
  { name: "updated", title: "Last event", of: (row) => Date.parse(row.run.updated_at ?? 0) },
];

/** The order that is not told in the address: who needs somebody first. */
const USUAL = "state";

/** Show the list of runs in `root`; return how to end it. */
export function mountRuns(root, api) {
  return new Runs(root, api).end;
}

class Runs {
  #api;
  #rows = new Map();
  #wish = readAddress();
  #isComplete = false;
  #frame = 0;
  #loads = 0;
  #stops = [];

  constructor(root, api) {
    this.#api = api;
    this.#build();
    root.append(this.place);
    this.#heed(window, "popstate", () => this.#readWish());
    this.#heed(document, "visibilitychange", () => this.#schedule());
    const timer = setInterval(() => this.#schedule(), TICK_MS);
    this.#stops.push(() => clearInterval(timer));
    this.#stops.push(
      api.streamRuns({
        // What changed while the stream was away is not told again.
        opened: () => this.#load(),
        runs: ({ runs, deleted }) => this.#take(runs, deleted),
      }),
    );
    this.#load();
  }

  end = () => {
    cancelAnimationFrame(this.#frame);
    this.#loads += 1;
    for (const stop of this.#stops) stop();
  };

  #heed(target, name, callback) {
    target.addEventListener(name, callback);
    this.#stops.push(() => target.removeEventListener(name, callback));
  }

  #build() {
    this.text = element("input", {
      type: "search",
      id: "runs-text",
      placeholder: "name or stage",
      autocomplete: "off",
      spellcheck: "false",
      oninput: () => this.#setWish({ text: this.text.value }),
    });
    this.state = element(
      "select",
      { id: "runs-state", onchange: () => this.#setWish({ state: this.state.value }) },
      element("option", { value: "", text: "any state" }),
      element("option", { value: "advice", text: "advice to answer" }),
      STATES.map((word) => element("option", { value: word, text: word })),
    );
    this.order = element(
      "select",
      { id: "runs-order", onchange: () => this.#setWish({ sort: this.order.value }) },
      COLUMNS.filter((column) => column.of).map(({ name, title }) => [
        element("option", { value: name, text: title }),
        element("option", { value: `-${name}`, text: `${title}, reversed` }),
      ]),
    );
    this.shown = element("p", { class: "shown", role: "status" });
    this.failure = element("div", {});
    this.headings = COLUMNS.map((column) =>
      element(
        "th",
        { scope: "col", class: `col-${column.name}` },
        column.of
          ? element("button", {
              type: "button",
              text: column.title,
              onclick: () => this.#turn(column.name),
            })
          : column.title,
      ),
    );
    this.body = element("tbody", {});
    this.table = element(
      "table",
      { class: "runs" },
      element("caption", { class: "visually-hidden", text: "All runs" }),
      element("thead", {}, element("tr", {}, this.headings)),
      this.body,
    );
    this.empty = element("div", { class: "empty", hidden: true });
    this.place = element(
      "section",
      { class: "panel", "aria-labelledby": "runs-title" },
      element("h1", { id: "runs-title", text: "Runs" }),
      element(
        "form",
        { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
        element("label", { for: "runs-text", text: "Filter" }),
        this.text,
        element("label", { for: "runs-state", class: "visually-hidden", text: "State" }),
        this.state,
        element("label", { for: "runs-order", class: "narrow", text: "Order" }),
        element("span", { class: "narrow" }, this.order),
        this.shown,
      ),
      this.failure,
      this.table,
      this.empty,
    );
    this.#showWish();
  }

  /** Read all pages; rows show as they come. */
  async #load() {
    const mine = ++this.#loads;
    const seen = new Set();
    try {
      let token = "";
      do {
        const page = await this.#api.runs(token);
        if (mine !== this.#loads) return;
        for (const run of page.runs) {
          seen.add(run.name);
          this.#keep(run, run.spark ?? []);
        }
        token = page.next_page_token;
        this.#schedule();
      } while (token);
    } catch (error) {
      if (mine === this.#loads) showError(this.failure, error, () => this.#load());
      return;
    }
    this.failure.replaceChildren();
    for (const [name, row] of this.#rows) {
      // A run that the stream brought since has not been on a page yet.
      if (!seen.has(name) && row.load < mine) this.#rows.delete(name);
    }
    this.#isComplete = true;
    this.#schedule();
  }

  #take(runs, deleted) {
    for (const run of runs) this.#keep(run, null);
    for (const name of deleted) this.#rows.delete(name);
    this.#schedule();
  }

  /** Keep what is known of a run; `spark`: its course, null: it goes on by its last loss. */
  #keep(run, spark) {
    let row = this.#rows.get(run.name);
    if (!row) {
      row = { spark: [], isNewSpark: true };
      this.#rows.set(run.name, row);
    } else if (row.run.seq > run.seq) {
      // A page that was read before the stream said more. A run made anew begins at 1 again.
      if (spark !== null && row.run.created_at === run.created_at) return;
    }
    if (spark !== null) {
      row.spark = spark.map(([progress, loss]) => [progress, toNumber(loss)]);
      row.isNewSpark = true;
    } else {
      goOn(row, run);
    }
    row.run = run;
    row.load = this.#loads;
    row.isNew = true;
  }

  #schedule() {
    if (this.#frame || document.hidden) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const now = nowMs();
    const shown = [];
    for (const row of this.#rows.values()) {
      row.state = stateOf(row.run, now);
      row.urgency = urgency(row);
      if (matches(row, this.#wish)) shown.push(row);
    }
    sortRows(shown, this.#wish.sort);
    let place = this.body.firstChild;
    for (const row of shown) {
      row.view ??= new RowView(row.run.name);
      row.view.show(row, now);
      if (row.view.line === place) place = place.nextSibling;
      else this.body.insertBefore(row.view.line, place);
    }
    while (place) {
      const next = place.nextSibling;
      place.remove();
      place = next;
    }
    this.#say(shown.length);
  }

  #say(shown) {
    const all = this.#rows.size;
    this.table.hidden = shown === 0;
    this.empty.hidden = shown > 0 || !this.#isComplete;
    const waits = [...this.#rows.values()].filter((row) => row.run.pending_advice > 0).length;
    const text = !this.#isComplete && all === 0 ? "loading…" : shown === all ? plural(all, "run") : `${count(shown)} of ${plural(all, "run")}`;
    setText(this.shown, waits ? `${text}, ${count(waits)} with advice to answer` : text);
    if (this.empty.hidden || this.empty.dataset.all === String(all > 0)) return;
    this.empty.dataset.all = all > 0;
    this.empty.replaceChildren(...(all > 0 ? this.#nothingMatches() : howToBegin()));
  }

  #nothingMatches() {
    return [
      element("p", { text: "No run matches." }),
      element("button", {
        class: "button",
        type: "button",
        text: "Show all runs",
        onclick: () => {
          this.#setWish({ text: "", state: "" });
          this.text.focus();
        },
      }),
    ];
  }

  #turn(name) {
    const { sort } = this.#wish;
    this.#setWish({ sort: sort === name ? `-${name}` : name });
  }

  #setWish(change) {
    this.#wish = { ...this.#wish, ...change };
    const query = new URLSearchParams();
    if (this.#wish.text) query.set("q", this.#wish.text);
    if (this.#wish.state) query.set("state", this.#wish.state);
    if (this.#wish.sort !== USUAL) query.set("sort", this.#wish.sort);
    const text = query.toString();
    history.replaceState(history.state, "", text ? `?${text}` : location.pathname);
    this.#showWish();
    this.#schedule();
  }

  #readWish() {
    this.#wish = readAddress();
    this.#showWish();
    this.#schedule();
  }

  #showWish() {
    const { text, state, sort } = this.#wish;
    if (this.text.value !== text) this.text.value = text;
    this.state.value = state;
    this.order.value = sort;
    const [name, direction] = sort.startsWith("-")
      ? [sort.slice(1), "descending"]
      : [sort, "ascending"];
    this.headings.forEach((heading, index) => {
      if (COLUMNS[index].name === name) heading.setAttribute("aria-sort", direction);
      else heading.removeAttribute("aria-sort");
    });
  }
}

/** A line of the table; only what differs from what it shows is touched. */
class RowView {
  constructor(name) {
    this.state = element("td", { class: "col-state" });
    this.link = element("a", { href: `/runs/${encodeURIComponent(name)}`, text: name });
    this.stage = element("span", { class: "stage" });
    this.bar = element("progress", { max: "1", "aria-label": `progress of ${name}` });
    this.share = element("span", { class: "share" });
    this.progress = element("span", { class: "detail" });
    this.lr = element("td", { class: "col-lr number", dataset: { title: "LR" } });
    this.loss = element("td", { class: "col-loss number", dataset: { title: "loss" } });
    this.trend = element("td", { class: "col-trend" });
    this.advice = element("td", { class: "col-advice" });
    this.time = element("time", {});
    this.line = element(
      "tr",
      {},
      this.state,
      element("th", { scope: "row", class: "col-name" }, this.link, this.stage),
      element("td", { class: "col-progress" }, this.bar, this.share, this.progress),
      this.lr,
      this.loss,
      this.trend,
      this.advice,
      element("td", { class: "col-updated" }, this.time),
    );
  }

  show(row, now) {
    const { run, state } = row;
    if (this.word !== state.word) {
      this.word = state.word;
      this.state.replaceChildren(badge(state.tone, state.word));
    }
    const time = run.updated_at;
    if (time) setText(this.time, ago(time, now));
    if (!row.isNew) return;
    row.isNew = false;
    if (time) {
      this.time.dateTime = time;
      this.time.title = utc(time);
    }
    if (run.state === "unreadable") {
      setText(this.stage, "its log cannot be read; the log of the server says why");
      return;
    }
    setText(this.stage, run.stage);
    this.bar.value = share(run);
    setText(this.share, percent(share(run)));
    setText(this.progress, `${count(run.progress)} of ${count(run.total)} ${run.unit}`);
    setText(this.lr, run.values.length ? rate(run.values[0].learning_rate) : "–");
    setText(this.loss, rate(run.loss));
    const loss = toNumber(run.loss);
    this.loss.dataset.tone = loss === null || Number.isFinite(loss) ? "" : "bad";
    if (row.isNewSpark) {
      row.isNewSpark = false;
      this.trend.replaceChildren(sparkline(row.spark));
    }
    const waiting = run.pending_advice ?? 0;
    if (this.waiting !== waiting) {
      this.waiting = waiting;
      this.advice.replaceChildren(...(waiting ? [badge("warn", `${count(waiting)} to answer`)] : []));
    }
  }
}

/** Take a run's last loss into its sparkline. */
function goOn(row, run) {
  const loss = toNumber(run.loss);
  if (loss === null) {
    row.isNewSpark = row.spark.length > 0;
    row.spark = [];
    return;
  }
  // What a later attempt runs again is drawn again.
  const kept = row.spark.filter(([progress]) => progress < run.frontier - 1);
  kept.push([Math.max(0, run.frontier - 1), loss]);
  row.spark =
    kept.length > MOST_POINTS
      ? kept.filter((_, index) => index % 2 === 0 || index >= kept.length - 2)
      : kept;
  row.isNewSpark = true;
}

function matches({ run, state }, wish) {
  if (wish.state === "advice" ? !(run.pending_advice > 0) : wish.state && wish.state !== state.word) {
    return false;
  }
  const words = wish.text.toLowerCase().split(/\s+/).filter(Boolean);
  const text = `${run.name} ${run.stage ?? ""}`.toLowerCase();
  return words.every((word) => text.includes(word));
}

/** A loss that is not finite and advice need somebody as well: before what only trains or is held. */
function urgency({ run, state }) {
  const place = STATES.indexOf(state.word);
  if (run.state !== "running" || state.word === "at its end") return place;
  const loss = toNumber(run.loss);
  const held = STATES.indexOf("is held");
  if (loss !== null && !Number.isFinite(loss)) return Math.min(place, held - 0.75);
  return run.pending_advice > 0 ? Math.min(place, held - 0.5) : place;
}

function sortRows(rows, sort) {
  const sign = sort.startsWith("-") ? -1 : 1;
  const { of } = COLUMNS.find(({ name }) => name === sort.replace("-", ""));
  // Keys are read once: hundreds of rows are compared thousands of times.
  for (const row of rows) row.key = of(row);
  const isMissing = (key) => key === null || Number.isNaN(key);
  rows.sort((one, other) => {
    // What has no value is last either way.
    if (isMissing(one.key) !== isMissing(other.key)) return isMissing(one.key) ? 1 : -1;
    if (one.key !== other.key && !isMissing(one.key)) return one.key < other.key ? -sign : sign;
    return one.run.name < other.run.name ? -1 : 1;
  });
}

function share(run) {
  return run.total ? Math.min(1, run.progress / run.total) : 0;
}

function setText(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

function readAddress() {
  const query = new URLSearchParams(location.search);
  const sort = query.get("sort") ?? USUAL;
  const known = COLUMNS.some(({ name, of }) => of && name === sort.replace("-", ""));
  return {
    text: query.get("q") ?? "",
    state: query.get("state") ?? "",
    sort: known ? sort : USUAL,
  };
}

function howToBegin() {
  const code = (text) => element("pre", {}, element("code", { text }));
  return [
    element("p", {}, element("strong", { text: "No runs yet." })),
    element("p", { text: "A trainer that connects with a spec creates its run. To create one before the job starts:" }),
    code("lrpilot preset list\nlrpilot preset show NAME > spec.yaml\nlrpilot run create spec.yaml"),
    element("p", { text: "It shows here at once; so do its losses, as soon as ranks report." }),
  ];
}
