// Words that come up in a corner. Good news goes by itself, bad news stays until it is put away.
import { icon } from "./page.js";

const SHOWN_MS = 6000;

export function toast(text, { hint = "", bad = false } = {}) {
  if (!text) return;
  const box = document.createElement("div");
  const words = document.createElement("div");
  const close = document.createElement("button");
  box.className = bad ? "toast bad" : "toast";
  words.textContent = text;
  if (hint) words.append(Object.assign(document.createElement("small"), { textContent: hint }));
  close.className = "quiet";
  close.type = "button";
  close.ariaLabel = "put away";
  close.append(icon("x"));
  close.addEventListener("click", () => box.remove());
  box.append(words, close);
  document.querySelector(bad ? "#toasts [role=alert]" : "#toasts [role=status]").append(box);
  if (!bad) setTimeout(() => box.remove(), SHOWN_MS);
}

/** Show a problem document. */
export function problem(document_) {
  toast(document_.detail || "something went wrong", { hint: document_.hint, bad: true });
}
