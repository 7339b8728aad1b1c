// The stretch of progress that all charts of a run show.

const LEAST_WIDTH = 4;
/** Share of the width that stays free on the right in follow mode. */
const AHEAD = 0.08;
/** Share of the run that follow mode shows where nothing was zoomed before. */
const FOLLOWED = 0.1;

export class Viewport {
  #listeners = new Set();
  /** What there is: [0, end] of the run. */
  bounds = [0, 1];
  /** [begin, end] of what is seen; null: all of it. */
  range = null;
  /** Width that is kept at the newest progress; null: it does not follow. */
  follow = null;
  #newest = 0;

  /** Call back on every change, with whether a person made it; return how to stop. */
  onChange(callback) {
    this.#listeners.add(callback);
    return () => this.#listeners.delete(callback);
  }

  /** First progress seen. */
  get min() {
    return (this.range ?? this.bounds)[0];
  }

  /** Last progress seen. */
  get max() {
    return (this.range ?? this.bounds)[1];
  }

  /** Tell how far the run goes and how far it is: `newest` is the horizon. */
  setBounds(end, newest) {
    const least = Math.max(LEAST_WIDTH, end);
    if (this.bounds[1] === least && this.#newest === newest) return;
    this.bounds = [0, least];
    this.#newest = newest;
    if (this.follow !== null) this.range = this.#followed();
    this.#tell(false);
  }

  /** Show a stretch, within what there is; all of it where it is as wide as that. */
  show(begin, end, byPerson = true) {
    this.follow = null;
    const [low, high] = this.bounds;
    const width = Math.min(high - low, Math.max(LEAST_WIDTH, end - begin));
    if (width >= high - low) this.range = null;
    else {
      const middle = (begin + end) / 2;
      const first = Math.round(Math.min(Math.max(low, middle - width / 2), high - width));
      this.range = [first, Math.round(first + width)];
    }
    this.#tell(byPerson);
  }

  /** Show all. */
  reset() {
    this.show(...this.bounds);
  }

  /** Show `factor` as much around `at`, which stays where it is. */
  zoom(factor, at = (this.min + this.max) / 2) {
    const begin = at - (at - this.min) * factor;
    this.show(begin, begin + Math.max(LEAST_WIDTH, (this.max - this.min) * factor));
  }

  /** Move by a share of the width. */
  pan(share) {
    if (!this.range) return;
    const by = share * (this.max - this.min);
    this.show(this.min + by, this.max + by);
  }

  /** Bring a progress into view, if it is not. */
  reveal(at) {
    if (at >= this.min && at <= this.max) return;
    const width = this.max - this.min;
    this.show(at - width / 2, at + width / 2);
  }

  /** Keep the newest in view, with the width that is seen or `width`; or stay where it is. */
  setFollow(isOn, width = null) {
    if (!isOn) this.follow = null;
    else {
      const whole = this.bounds[1] - this.bounds[0];
      this.follow = width ?? (this.range ? this.max - this.min : Math.round(FOLLOWED * whole));
      this.follow = Math.max(LEAST_WIDTH, this.follow);
      this.range = this.#followed();
    }
    this.#tell(true);
  }

  #followed() {
    const end = Math.min(this.bounds[1], Math.max(this.follow, this.#newest + AHEAD * this.follow));
    return [Math.round(Math.max(this.bounds[0], end - this.follow)), Math.round(end)];
  }

  #tell(byPerson) {
    for (const callback of this.#listeners) callback(byPerson);
  }
}
