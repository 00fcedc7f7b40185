// The button that goes round system, light, dark.
import { icon } from "./page.js";

const NEXT = { system: "light", light: "dark", dark: "system" };
const ICONS = { system: "monitor", light: "sun", dark: "moon" };
const WORDS = { system: "as the system", light: "light", dark: "dark" };

function show() {
  const chosen = document.documentElement.dataset.chosen;
  for (const button of document.querySelectorAll("[data-theme-button]")) {
    button.ariaLabel = `Colours: ${WORDS[chosen]}`;
    button.title = button.ariaLabel;
    button.replaceChildren(icon(ICONS[chosen]));
  }
}

document.addEventListener("click", (event) => {
  if (!event.target.closest("[data-theme-button]")) return;
  localStorage.setItem("theme", NEXT[document.documentElement.dataset.chosen]);
  document.dispatchEvent(new Event("conpaas:choose-theme"));
});
document.addEventListener("conpaas:theme", show);
show();
