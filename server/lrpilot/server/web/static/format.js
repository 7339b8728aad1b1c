// Numbers, progress and times as text. Everywhere on the page the same.

import { nowMs } from "./clock.js";

const COUNT = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** Return a number of the server's JSON, where "nan", "inf" and "-inf" are text; null stays null. */
export function toNumber(value) {
  switch (value) {
    case null:
    case undefined:
      return null;
    case "nan":
      return NaN;
    case "inf":
      return Infinity;
    case "-inf":
      return -Infinity;
    default:
      return Number(value);
  }
}

/** Return an integer with commas: 31,012. */
export function count(value) {
  return COUNT.format(value);
}

/** Return a count of things: "1 loss", "2 losses". */
export function plural(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** Return a large number shortly, for axes: 950, 31.5k, 1.2M, 3T. */
export function compact(value) {
  const size = Math.abs(value);
  for (const [unit, letter] of [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (size >= unit) return `${Number((value / unit).toPrecision(6))}${letter}`;
  }
  return String(Number(value.toPrecision(6)));
}

/** Return a loss, a learning rate or the like with four significant digits: 2.314, 3e-4, NaN. */
export function rate(value, digits = 4) {
  const number = toNumber(value);
  if (number === null) return "–";
  if (Number.isNaN(number)) return "NaN";
  if (!Number.isFinite(number)) return number > 0 ? "inf" : "-inf";
  if (number === 0) return "0";
  const size = Math.abs(number);
  if (size >= 1e-3 && size < 1e6) return String(Number(number.toPrecision(digits)));
  return Number(number.toPrecision(digits)).toExponential().replace("e+", "e");
}

/** Return a share: 62 %, 0.4 %. */
export function percent(share) {
  const value = 100 * share;
  const digits = value === 0 || Math.abs(value) >= 10 ? 0 : 1;
  return `${value.toFixed(digits)} %`;
}

/** Return where a run is: "31,012 of 50,000 iterations". */
export function progressText(run) {
  return `${count(run.progress)} of ${count(run.total)} ${run.unit}`;
}

/** Return a length of time: 8 s, 3 min, 2 h 5 min, 4 d. */
export function duration(seconds) {
  if (seconds < 1) return seconds > 0.05 ? `${seconds.toFixed(1)} s` : "0 s";
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  const days = Math.floor(hours / 24);
  return days < 10 && hours % 24 ? `${days} d ${hours % 24} h` : `${days} d`;
}

/** Return how long ago a time of the server's (RFC 3339) was, in seconds, never negative. */
export function secondsSince(time, now = nowMs()) {
  return Math.max(0, (now - Date.parse(time)) / 1000);
}

/** Return how long ago it was: "8 s ago". */
export function ago(time, now = nowMs()) {
  return `${duration(secondsSince(time, now))} ago`;
}

/** Return a time in UTC, to the second, as the command line has it: 2026-03-01 04:05:06Z. */
export function utc(time) {
  return new Date(time)
    .toISOString()
    .replace("T", " ")
    .replace(/\.\d+Z$/, "Z");
}

/** Return a value before and after a change, once where it is the same: "2e-4 → 1e-4". */
export function arrow(before, after) {
  return toNumber(before) === toNumber(after) ? rate(after) : `${rate(before)} → ${rate(after)}`;
}

/** Return what an adjustment does to the first group that it changes: "LR 2e-4 → 1e-4 (+1 group)". */
export function changeText(item) {
  const parts = [];
  for (const [name, before, after] of [
    ["LR", item.before, item.after],
    ["WD", item.weight_decay_before, item.weight_decay_after],
  ]) {
    const moved = (before ?? []).map((value, index) => [value, after[index]]).filter(([a, b]) => a !== b);
    if (moved.length) {
      const more = moved.length > 1 ? ` (+${plural(moved.length - 1, "group")})` : "";
      parts.push(`${name} ${arrow(...moved[0])}${more}`);
    }
  }
  return parts.join(", ") || "LR and WD as before";
}
