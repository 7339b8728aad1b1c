// The curves of a run as the charts take them: decoded, joined from parts, looked up.
//
// A column set is `{ x, …columns }` of equally long arrays in order of x, which is progress in the
// run's unit. Every function here is pure.

import { toNumber } from "./format.js";

/** Return a GetCurvesResponse of the server's JSON with numbers for numbers. */
export function decode(answer) {
  return {
    seq: answer.seq,
    begin: answer.begin,
    end: answer.end,
    progress: answer.progress,
    horizon: answer.horizon,
    losses: answer.losses.map((item) => ({
      attempt: item.attempt,
      begin: item.begin,
      forgottenFrom: item.forgotten_from ?? Infinity,
      ...columnsOf(item.loss),
    })),
    smoothed: columnsOf(answer.smoothed_loss),
    validation: new Map(
      Object.entries(answer.validation_losses ?? {})
        .sort(([a], [b]) => (a < b ? -1 : 1))
        .map(([name, curve]) => [name, columnsOf(curve)]),
    ),
    norm: columnsOf(answer.gradient_norm),
    groups: answer.groups.map((item) => ({
      name: item.name,
      x: item.progress,
      lr: item.learning_rate.map(toNumber),
      base: item.base_learning_rate.map(toNumber),
      ...(item.weight_decay.length ? { wd: item.weight_decay.map(toNumber) } : {}),
    })),
    groupCount: answer.group_count,
    stages: answer.stages,
  };
}

function columnsOf(curve) {
  return { x: curve?.progress ?? [], y: (curve?.value ?? []).map(toNumber) };
}

/**
 * Return `base` with everything in [part.begin, part.end] replaced by that of `part`. What holds for the
 * whole run, as progress and horizon, is that of the newer one.
 */
export function splice(base, part) {
  const { begin, end } = part;
  const newer = part.seq >= base.seq ? part : base;
  const put = (before, after) => spliceColumns(before, after, begin, end);
  const attempts = new Map(base.losses.map((item) => [item.attempt, [item, null]]));
  for (const item of part.losses) attempts.set(item.attempt, [attempts.get(item.attempt)?.[0] ?? null, item]);
  return {
    ...newer,
    begin: base.begin,
    end: base.end,
    losses: [...attempts.values()].map(([before, after]) => ({ ...before, ...after, ...put(before, after) })),
    smoothed: put(base.smoothed, part.smoothed),
    validation: new Map(
      [...new Set([...base.validation.keys(), ...part.validation.keys()])]
        .sort()
        .map((name) => [name, put(base.validation.get(name), part.validation.get(name))]),
    ),
    norm: put(base.norm, part.norm),
    groups: newer.groups.map((group) => ({
      name: group.name,
      ...put(named(base.groups, group.name), named(part.groups, group.name)),
    })),
  };
}

function named(groups, name) {
  return groups.find((group) => group.name === name);
}

const LISTS = ["x", "y", "lr", "base", "wd"];

/** Return `before` with its points in [begin, end] replaced by those of `after`; either may be missing. */
function spliceColumns(before, after, begin, end) {
  const kept = before ?? { x: [] };
  const put = after ?? { x: [] };
  const left = lowerBound(kept.x, begin);
  const right = lowerBound(kept.x, end + 1);
  const first = lowerBound(put.x, begin);
  const last = lowerBound(put.x, end + 1);
  const made = {};
  for (const name of LISTS) {
    if (!(name in kept) && !(name in put)) continue;
    made[name] = [
      ...(kept[name] ?? []).slice(0, left),
      ...(put[name] ?? []).slice(first, last),
      ...(kept[name] ?? []).slice(right),
    ];
  }
  return made;
}

/** Return the least index whose x is not below `value`; the length where there is none. */
export function lowerBound(x, value) {
  let low = 0;
  let high = x.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Return the index of the point nearest to `value`; -1 where there is none. */
export function nearest(x, value) {
  if (!x.length) return -1;
  const index = Math.min(lowerBound(x, value), x.length - 1);
  return index > 0 && value - x[index - 1] <= x[index] - value ? index - 1 : index;
}

/** Return the value of a curve at `at`, straight between its points; null outside of them. */
export function valueAt(x, y, at) {
  const index = lowerBound(x, at);
  if (index === x.length || (index === 0 && x[0] !== at)) return null;
  if (x[index] === at) return y[index];
  const share = (at - x[index - 1]) / (x[index] - x[index - 1]);
  return y[index - 1] + share * (y[index] - y[index - 1]);
}

/** Return the losses that count, of all attempts, as columns. */
export function countingLosses(curves) {
  const x = [];
  const y = [];
  for (const item of curves.losses) {
    const end = lowerBound(item.x, item.forgottenFrom);
    for (let index = 0; index < end; index += 1) {
      x.push(item.x[index]);
      y.push(item.y[index]);
    }
  }
  return { x, y };
}

/** Return what was forgotten of each attempt of which something was, as columns. */
export function forgottenLosses(curves) {
  return curves.losses
    .map((item) => {
      const begin = lowerBound(item.x, item.forgottenFrom);
      return { attempt: item.attempt, x: item.x.slice(begin), y: item.y.slice(begin) };
    })
    .filter((item) => item.x.length);
}

/** Return the progress of each loss shown that is NaN or infinite, of those that count. */
export function nonfiniteLosses(curves) {
  const { x, y } = countingLosses(curves);
  return x.filter((_, index) => y[index] !== null && !Number.isFinite(y[index]));
}

/** Return a curve of a group in two: what is fixed, up to the horizon, and what is planned from there on. */
export function splitAt(x, y, horizon) {
  const index = lowerBound(x, horizon);
  const isBetween = index > 0 && index < x.length && x[index] !== horizon;
  const join = isBetween ? [[horizon], [valueAt(x, y, horizon)]] : [[], []];
  const past = isBetween ? index : Math.min(index + 1, x.length);
  return {
    past: { x: [...x.slice(0, past), ...join[0]], y: [...y.slice(0, past), ...join[1]] },
    planned: { x: [...join[0], ...x.slice(index)], y: [...join[1], ...y.slice(index)] },
  };
}

/** Return how many points the longest curve has. */
export function longest(curves) {
  const lengths = [curves.smoothed, curves.norm, ...curves.losses, ...curves.groups].map(
    (item) => item.x.length,
  );
  return Math.max(0, ...lengths);
}
