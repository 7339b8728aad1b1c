// What the panels of one run share: the run as it is now, what is selected, the range shown.

/**
 * Handed to every panel of a run: `mountEvents(root, context)` and the like.
 *
 * `api`, `name`: whom to ask, and for which run. `run`: as the server last sent it, with adjustments;
 * `spec_document` is that of the last full answer. A panel returns how to end it, or nothing.
 */
export class RunContext {
  #listeners = {
    run: new Set(),
    curves: new Set(),
    select: new Set(),
    range: new Set(),
    preview: new Set(),
    said: new Set(),
  };
  run = null;
  /** The curves that are drawn, as `decode` of curves.js has them; null: not there yet. */
  curves = null;
  /** Id of the adjustment or advice that is selected; null: none. */
  selected = null;

  constructor(api, name) {
    this.api = api;
    this.name = name;
  }

  /** Call back with the run at once where there is one, and on every change; return how to stop. */
  onRun(callback) {
    if (this.run) callback(this.run);
    return this.#listen("run", callback);
  }

  /** Call back whenever the curves drawn changed; return how to stop. */
  onCurves(callback) {
    return this.#listen("curves", callback);
  }

  /** Call back with the id of what is selected, null for nothing. */
  onSelect(callback) {
    return this.#listen("select", callback);
  }

  /** Call back with (begin, end) when some panel asks for a range to be seen. */
  onRange(callback) {
    return this.#listen("range", callback);
  }

  /** Call back with the points of a preview, null for none. */
  onPreview(callback) {
    return this.#listen("preview", callback);
  }

  /** Call back with the outcome of a change that was asked for here, as a sentence. */
  onSaid(callback) {
    return this.#listen("said", callback);
  }

  /** Tell everyone of a newer state of the run. */
  setRun(run) {
    this.run = { spec_document: this.run?.spec_document, ...run };
    this.#tell("run", this.run);
  }

  /** Tell everyone of the curves that are drawn now. */
  setCurves(curves) {
    this.curves = curves;
    this.#tell("curves", curves);
  }

  /** Return the adjustment, advice or directive with that id; undefined: there is none. */
  find(id) {
    return this.run?.adjustments?.find((item) => item.id === id);
  }

  /** Select an adjustment or an advice by its id, everywhere; null: none. */
  select(id) {
    this.selected = id;
    this.#tell("select", id);
  }

  /** Show the progress from `begin` to `end` on the charts. */
  showRange(begin, end) {
    this.#tell("range", begin, end);
  }

  /** Draw what a change would do: the `preview` of a dry run's answer; null: draw none. */
  preview(points) {
    this.#tell("preview", points);
  }

  /** Announce the outcome of a change. */
  say(text) {
    this.#tell("said", text);
  }

  #listen(kind, callback) {
    this.#listeners[kind].add(callback);
    return () => this.#listeners[kind].delete(callback);
  }

  #tell(kind, ...said) {
    for (const callback of this.#listeners[kind]) callback(...said);
  }
}
