"use strict";
// Before anything is drawn: the colours that were chosen, or else the system's.
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const chosen = localStorage.getItem("theme") || "system";
    const dark = chosen === "dark" || (chosen === "system" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    document.documentElement.dataset.chosen = chosen;
    document.dispatchEvent(new Event("conpaas:theme"));
  };
  system.addEventListener("change", apply);
  document.addEventListener("conpaas:choose-theme", apply);
  apply();
})();
