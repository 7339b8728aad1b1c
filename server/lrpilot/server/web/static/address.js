// What is seen of a run as parameters of its address, so that it can be sent to someone.

/** Return what the address asks for. Parameters that make no sense count as left out. */
export function readAddress(search = location.search) {
  const asked = new URLSearchParams(search);
  const number = (name) => {
    const text = asked.get(name);
    return text !== null && /^\d{1,15}$/.test(text) ? Number(text) : null;
  };
  const [from, to] = [number("from"), number("to")];
  return {
    range: from !== null && to !== null && from < to ? [from, to] : null,
    follow: number("follow"),
    log: new Set((asked.get("log") ?? "").split(",").filter((name) => name === "loss" || name === "lr")),
    groups: asked.getAll("group"),
  };
}

/** Return the address that asks for it; see `readAddress`. Other parameters stay as they are. */
export function addressOf({ range, follow, log, groups }) {
  const asked = new URLSearchParams(location.search);
  for (const name of ["from", "to", "follow", "log", "group"]) asked.delete(name);
  if (follow !== null) asked.set("follow", follow);
  else if (range) {
    asked.set("from", range[0]);
    asked.set("to", range[1]);
  }
  if (log.size) asked.set("log", [...log].sort().join(","));
  for (const name of groups) asked.append("group", name);
  const text = asked.toString().replaceAll("%2C", ",");
  return location.pathname + (text ? `?${text}` : "");
}
