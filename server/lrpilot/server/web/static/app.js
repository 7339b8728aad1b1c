// The page: which view an address shows, and the bar above it.

import { createApi } from "./api.js";
import { mountRun } from "./run.js";
import { mountRuns } from "./runs.js";

const CONNECTION = {
  connecting: ["faint", () => "connecting…"],
  live: ["ok", () => "live"],
  reconnecting: ["warn", () => "reconnecting…"],
  "not ready": ["bad", (why) => `server not ready: ${why}`],
};

const api = createApi();
const main = document.getElementById("main");
let shown = null;
let unmount = () => {};

/** Show the view of the address, unless it is shown already: views heed their own parameters. */
function show() {
  if (location.pathname === shown) return;
  // A dialog is about the run that is left.
  document.querySelector("dialog[open]")?.close();
  unmount();
  shown = location.pathname;
  main.replaceChildren();
  const name = nameOf(shown);
  document.title = name ? `${name} · lrpilot` : "Runs · lrpilot";
  unmount = name ? mountRun(main, api, name) : mountRuns(main, api);
}

/** Return the run whose address a path is; empty: it is that of the list. */
function nameOf(path) {
  const part = path.match(/^\/runs\/(.+)$/)?.[1] ?? "";
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // No name either: the server says so.
  }
}

function showConnection() {
  const [tone, text] = CONNECTION[api.connection.state];
  const place = document.getElementById("connection");
  place.dataset.tone = tone;
  place.textContent = text(api.connection.why);
  place.title = api.connection.why;
  const server = api.server;
  if (server) {
    const said = server.read_only ? `, read-only: ${server.why_read_only}` : "";
    document.getElementById("footer").textContent = `lrpilot ${server.version}${said}`;
  }
}

// A link within the page changes the view; every other link and every modified click is the browser's.
document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href]");
  const isPlain = event.button === 0 && !(event.ctrlKey || event.metaKey || event.shiftKey || event.altKey);
  if (!link || !isPlain || event.defaultPrevented || link.target || link.origin !== location.origin) return;
  if (link.pathname !== "/" && !link.pathname.startsWith("/runs/")) return;
  if (link.hash && link.pathname === location.pathname) return;
  event.preventDefault();
  history.pushState(null, "", link.href);
  show();
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
});
addEventListener("popstate", show);
api.connection.onChange(showConnection);
api.watch();
show();
