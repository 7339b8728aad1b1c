// The time by the server's clock: that of the machine that shows the page may be wrong.

let aheadMs = 0;

/** Take the server's time (RFC 3339), as it was between two moments of this machine's own clock, in milliseconds. */
export function setClock(time, sentMs, gotMs) {
  aheadMs = Date.parse(time) - (sentMs + gotMs) / 2;
}

/** Return the time now, in milliseconds since 1970. */
export function nowMs() {
  return Date.now() + aheadMs;
}
