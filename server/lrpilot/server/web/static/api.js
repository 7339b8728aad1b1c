// What the page asks the server, and how it stays in touch with it.
//
// JSON as the server sends it: field names of the proto files, and "nan", "inf", "-inf" in place of
// non-finite numbers: `toNumber` of format.js reads them.

import { setClock } from "./clock.js";

const DEADLINE_MS = 10_000;
const LOOK_EVERY_MS = 15_000;
const RETRY_MS = [500, 1_000, 2_000, 4_000, 8_000];

/** A failed call. `message` is for people; `reason` is the server's name of the error, or "Unreachable". */
export class ApiError extends Error {
  constructor(status, reason, message, fields = []) {
    super(message);
    this.status = status;
    this.reason = reason;
    this.fields = fields;
  }
}

/** Whether the server can be reached, for everyone who wants to show it. */
class Connection {
  #listeners = new Set();
  state = "connecting";
  /** Why, where the state alone does not say it. */
  why = "";

  /** Tell it; `state`: "connecting", "live", "reconnecting" or "not ready". */
  set(state, why = "") {
    if (state === this.state && why === this.why) return;
    this.state = state;
    this.why = why;
    for (const listener of this.#listeners) listener();
  }

  /** Call `listener` on every change; return how to stop that. */
  onChange(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }
}

class Api {
  connection = new Connection();
  /** Answer of `/api/server`: version, read_only, why_read_only, author, ready; null: not yet. */
  server = null;
  #streamIsOpen = null;
  #looking = null;

  /** Answer of `/api/server`, asked for once; raises ApiError. */
  async serverInfo() {
    return this.server ?? this.look();
  }

  /** Ask how the server is, and keep the connection's state up to date with the answer. */
  async look() {
    try {
      // Several ask at once when a view opens.
      this.#looking ??= this.#askServer().finally(() => {
        this.#looking = null;
      });
      this.server = await this.#looking;
    } catch (error) {
      this.connection.set("reconnecting", error.message);
      throw error;
    }
    this.#say();
    return this.server;
  }

  async #askServer() {
    const sentMs = Date.now();
    const { time, ...server } = await this.#get("/api/server");
    setClock(time, sentMs, Date.now());
    return server;
  }

  /** Look again and again, while the page is seen. */
  watch() {
    const again = () => {
      if (!document.hidden) this.look().catch(() => {});
    };
    again();
    setInterval(again, LOOK_EVERY_MS);
    document.addEventListener("visibilitychange", again);
    addEventListener("online", again);
    addEventListener("offline", () => this.connection.set("reconnecting", "this machine is offline"));
  }

  #say() {
    if (this.#streamIsOpen === false) this.connection.set("reconnecting", "updates were cut off");
    else if (this.server?.ready) this.connection.set("not ready", this.server.ready);
    else if (this.server) this.connection.set("live");
  }

  /** A page of the list of runs. */
  runs(pageToken = "") {
    return this.#get("/api/runs", { page_token: pageToken });
  }

  /** A run with its adjustments and spec. */
  run(name) {
    return this.#get(`/api/runs/${encodeURIComponent(name)}`);
  }

  /** The curves; `begin`, `end` in the run's unit, about `points` points each, `groups` by name. */
  curves(name, { begin = 0, end = 0, points = 0, groups = [], signal = null } = {}) {
    const wanted = { begin, end, points, group: groups };
    return this.#get(`/api/runs/${encodeURIComponent(name)}/curves`, wanted, signal);
  }

  /** A page of the event log. */
  events(name, { pageToken = "", pageSize = 0, newestFirst = false, notable = false } = {}) {
    return this.#get(`/api/runs/${encodeURIComponent(name)}/events`, {
      page_token: pageToken,
      page_size: pageSize,
      newest_first: newestFirst ? 1 : "",
      notable: notable ? 1 : "",
    });
  }

  /** Every spec that the run had. */
  specs(name) {
    return this.#get(`/api/runs/${encodeURIComponent(name)}/specs`);
  }

  /** Change the plan, or with `dry_run` show what that would do: AdjustRunRequest without `run`. */
  adjust(name, body) {
    return this.#post(`/api/runs/${encodeURIComponent(name)}/adjust`, body);
  }

  /** Approve an advice, or show what that would do: ApproveAdviceRequest without `run`. */
  approve(name, body) {
    return this.#post(`/api/runs/${encodeURIComponent(name)}/approve`, body);
  }

  /** Follow the list of runs: see `#stream`; handlers `runs`. */
  streamRuns(handlers) {
    return this.#stream("/api/stream", handlers);
  }

  /** Follow one run: see `#stream`; handlers `run` and `gone`. */
  streamRun(name, handlers) {
    return this.#stream(`/api/runs/${encodeURIComponent(name)}/stream`, handlers);
  }

  async #get(path, query = {}, signal = null) {
    const asked = new URLSearchParams();
    for (const [key, value] of Object.entries(query)) {
      for (const one of Array.isArray(value) ? value : [value]) {
        if (Array.isArray(value) || (one !== "" && one !== 0)) asked.append(key, one);
      }
    }
    const text = asked.toString();
    return this.#call(text ? `${path}?${text}` : path, {}, signal);
  }

  #post(path, body) {
    const headers = { "Content-Type": "application/json" };
    return this.#call(path, { method: "POST", headers, body: JSON.stringify(body) });
  }

  /** Raises ApiError; a call that `signal` ended raises the signal's AbortError. */
  async #call(path, options, signal = null) {
    const deadline = AbortSignal.timeout(DEADLINE_MS);
    const ends = signal ? AbortSignal.any([deadline, signal]) : deadline;
    let answer;
    let text;
    try {
      answer = await fetch(path, { ...options, signal: ends, cache: "no-store" });
      text = await answer.text();
    } catch (error) {
      if (signal?.aborted) throw error;
      const why = deadline.aborted
        ? `The server did not answer within ${DEADLINE_MS / 1000} s.`
        : "The server cannot be reached.";
      throw new ApiError(0, "Unreachable", why);
    }
    let data = null;
    try {
      data = JSON.parse(text);
    } catch {
      // Something between the page and the server answered; said below.
    }
    if (answer.ok && data !== null) return data;
    const said = data?.error;
    const message = said?.message ?? `Not an answer of lrpilot: HTTP ${answer.status} for ${path}`;
    throw new ApiError(answer.status, said?.reason ?? "Unknown", message, said?.fields ?? []);
  }

  /**
   * Follow server-sent events; return how to stop.
   *
   * `handlers` maps the name of an event to a function of its data. It may have `opened(again)`:
   * called when the stream is open; `again`: it was open before, so that something may have been
   * missed; and `failed`: called whenever it ends or cannot be opened.
   *
   * While nobody sees the page it is closed: a browser has six connections to a server for all of its
   * tabs, and for pages that it keeps to go back to.
   */
  #stream(path, { opened = () => {}, failed = () => {}, ...handlers }) {
    let source = null;
    let timer = 0;
    let failures = 0;
    let wasOpen = false;

    const connect = () => {
      clearTimeout(timer);
      source?.close();
      source = new EventSource(path);
      source.addEventListener("open", () => {
        failures = 0;
        this.#streamIsOpen = true;
        this.look().catch(() => {});
        opened(wasOpen);
        wasOpen = true;
      });
      source.addEventListener("error", () => {
        // A browser tries again by itself after some failures and not after others.
        source.close();
        this.#streamIsOpen = false;
        this.connection.set("reconnecting", "updates were cut off");
        timer = setTimeout(connect, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]);
        failures += 1;
        failed();
      });
      for (const [name, handle] of Object.entries(handlers)) {
        source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
      }
    };

    const leave = () => {
      clearTimeout(timer);
      source?.close();
      source = null;
      this.#streamIsOpen = null;
    };
    const heed = () => {
      if (document.hidden) leave();
      else if (source === null) connect();
    };

    heed();
    document.addEventListener("visibilitychange", heed);
    addEventListener("pagehide", leave);
    addEventListener("pageshow", heed);
    return () => {
      document.removeEventListener("visibilitychange", heed);
      removeEventListener("pagehide", leave);
      removeEventListener("pageshow", heed);
      leave();
    };
  }
}

/** Return a new Api; the page has one. */
export function createApi() {
  return new Api();
}
