// Elements without markup in strings: nothing that a run says can become HTML.

/**
 * Return a new element.
 *
 * `properties`: `class`, `text`, `dataset`, handlers as `onclick`; all else is an attribute, where
 * null, undefined and false leave it out and true sets it empty. Children: nodes, text, lists of
 * them; null and false are left out.
 */
export function element(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** Likewise, of SVG. */
export function drawing(tag, properties = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);
}

function fill(made, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "text") made.textContent = value;
    else if (key === "dataset") Object.assign(made.dataset, value);
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== false));
  return made;
}

/** Return a section with its heading, as the views are made of: `<section class="panel"><h2>…`. */
export function panel(title, ...children) {
  const id = `panel-${title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}`;
  return element(
    "section",
    { class: "panel", "aria-labelledby": id },
    element("h2", { id, text: title }),
    children,
  );
}

/** Return a phrase in the colour of a tone: "ok", "info", "warn", "bad" or "faint". */
export function badge(tone, text) {
  return element("span", { class: "badge", dataset: { tone }, text });
}

/** Show a failure in words in place of what should stand in `root`; `retry` adds a button. */
export function showError(root, error, retry = null) {
  root.replaceChildren(
    element(
      "div",
      { class: "notice", dataset: { tone: "bad" }, role: "alert" },
      element("p", { text: error.message }),
      (error.fields ?? []).map((item) => element("p", { text: `${item.field}: ${item.text}` })),
      retry && element("button", { class: "button", type: "button", text: "Try again", onclick: retry }),
    ),
  );
}
