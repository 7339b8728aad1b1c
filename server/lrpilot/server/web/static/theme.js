// Light, dark, or what the system prefers. A classic script, so that it runs before the first paint.
"use strict";

(() => {
  const CHOICES = ["auto", "light", "dark"];
  const KEY = "lrpilot.theme";

  const read = () => {
    try {
      const kept = localStorage.getItem(KEY);
      return CHOICES.includes(kept) ? kept : "auto";
    } catch {
      return "auto"; // Storage is refused: the choice lasts as long as the page.
    }
  };

  let choice = read();
  const system = matchMedia("(prefers-color-scheme: dark)");

  const apply = () => {
    const dark = choice === "dark" || (choice === "auto" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = `Theme: ${choice}`;
      button.setAttribute("aria-label", `Theme: ${choice}; press for the next of auto, light, dark`);
    }
    // What draws on a canvas reads its colours again.
    document.dispatchEvent(new CustomEvent("themechange"));
  };

  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
      try {
        localStorage.setItem(KEY, choice);
      } catch {
        // As above.
      }
      apply();
    });
    apply();
  });
  apply();
})();
