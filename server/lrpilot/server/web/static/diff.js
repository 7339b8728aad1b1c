// The difference of two texts, line by line.

/** Unchanged lines shown around a change. */
const CONTEXT = 3;

/** Most cells of the table that finds the lines in common; beyond it a block is shown as replaced. */
const MOST_CELLS = 4_000_000;

/**
 * Return the lines of both texts in order, each as `{ sign, text }`.
 *
 * `sign`: " " in both, "-" only before, "+" only after. As few lines as possible are changed.
 */
export function lineDiff(before, after) {
  const old = before.split("\n");
  const now = after.split("\n");
  let begin = 0;
  while (begin < old.length && begin < now.length && old[begin] === now[begin]) begin++;
  let end = 0;
  while (
    end < old.length - begin &&
    end < now.length - begin &&
    old[old.length - 1 - end] === now[now.length - 1 - end]
  ) {
    end++;
  }
  return [
    ...signed(" ", old.slice(0, begin)),
    ...middle(old.slice(begin, old.length - end), now.slice(begin, now.length - end)),
    ...signed(" ", old.slice(old.length - end)),
  ];
}

/**
 * Return the lines of a difference that say something: changes with a few lines around each.
 *
 * A stretch that is left out is `{ sign: "@", text }`, where the text says how long it is.
 */
export function excerpt(lines) {
  const kept = new Set();
  lines.forEach((line, index) => {
    if (line.sign === " ") return;
    for (let near = index - CONTEXT; near <= index + CONTEXT; near++) kept.add(near);
  });
  const shown = [];
  for (let index = 0; index < lines.length; ) {
    let next = index;
    while (next < lines.length && !kept.has(next)) next++;
    // A mark in place of one line would hide it and save nothing.
    if (next - index === 1) shown.push(lines[index]);
    else if (next > index) shown.push({ sign: "@", text: `${next - index} lines as before` });
    if (next < lines.length) shown.push(lines[next]);
    index = next + 1;
  }
  return shown;
}

function signed(sign, lines) {
  return lines.map((text) => ({ sign, text }));
}

/** Return the difference of lists of lines by the longest common subsequence. */
function middle(old, now) {
  const width = now.length + 1;
  if ((old.length + 1) * width > MOST_CELLS) return [...signed("-", old), ...signed("+", now)];
  const common = new Uint32Array((old.length + 1) * width);
  for (let i = old.length - 1; i >= 0; i--) {
    for (let j = now.length - 1; j >= 0; j--) {
      common[i * width + j] =
        old[i] === now[j]
          ? common[(i + 1) * width + j + 1] + 1
          : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const lines = [];
  let i = 0;
  let j = 0;
  while (i < old.length || j < now.length) {
    if (i < old.length && j < now.length && old[i] === now[j]) {
      lines.push({ sign: " ", text: old[i] });
      i++;
      j++;
    } else if (j === now.length || (i < old.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) {
      lines.push({ sign: "-", text: old[i++] });
    } else {
      lines.push({ sign: "+", text: now[j++] });
    }
  }
  return lines;
}
