// Forms are sent without leaving the page; what goes wrong is said where it was asked for.
import { refresh } from "./page.js";
import { problem, toast } from "./toast.js";

export const csrf = () => document.querySelector("meta[name=csrf]").content;

/** Read an answer of ours; a problem, or no answer at all, comes back as one with `detail` and `hint`. */
export async function answerOf(sent) {
  try {
    const response = await sent;
    const words = await response.json();
    return { ok: response.ok, status: response.status, words };
  } catch {
    return {
      ok: false,
      status: 0,
      words: { detail: "there is no answer", hint: "check your connection and try again" },
    };
  }
}

/** Say in the form's own place what was wrong with it, or in a corner if it has none. */
export function complain(form, words) {
  const place = form.querySelector(".form-error");
  if (!place) return problem(words);
  place.textContent = words.detail;
  if (words.hint) place.append(Object.assign(document.createElement("small"), { textContent: words.hint }));
  place.hidden = false;
}

export function quieten(form) {
  const place = form.querySelector(".form-error");
  if (place) place.hidden = true;
}

/** Go on after an action has succeeded. */
export function goOn(form, words) {
  delete form.dataset.dirty;
  form.closest("dialog")?.close();
  const target = words.location ? new URL(words.location, location.href) : null;
  if (target && target.pathname !== location.pathname) {
    if (words.message) sessionStorage.setItem("toast", words.message);
    return location.assign(target);
  }
  for (const name of form.querySelectorAll(".in-place")) name.defaultValue = name.value;
  if (form.matches(".line-form, .stack")) form.reset();
  form.dispatchEvent(new CustomEvent("conpaas:done", { bubbles: true }));
  toast(words.message);
  if (words.secret) show(words.secret);
  if (words.html) form.querySelector(".findings").innerHTML = words.html; // made by our own templates
  if (words.result !== undefined) answer(form, words.result);
  return refresh();
}

function show(secret) {
  document.getElementById("secret-text").textContent = secret;
  document.getElementById("secret").showModal();
}

function answer(form, result) {
  const place = form.querySelector(".answer");
  place.textContent = JSON.stringify(result, null, 2);
  place.hidden = false;
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (form.method !== "post" || form.matches("[data-upload]")) return;
  event.preventDefault();
  if (form.dataset.sending) return; // a name that is changed and left by Enter is sent once
  form.dataset.sending = "yes";
  const button = event.submitter ?? form.querySelector("button:not([type=button])");
  quieten(form);
  button?.setAttribute("aria-busy", "true");
  const { ok, status, words } = await answerOf(
    fetch(event.submitter?.getAttribute("formaction") ?? form.action, {
      method: "POST",
      body: new URLSearchParams(new FormData(form, event.submitter)),
      headers: { Accept: "application/json", "X-CSRF-Token": csrf() },
    }),
  );
  button?.removeAttribute("aria-busy");
  delete form.dataset.sending;
  if (ok) return void (await goOn(form, words));
  if (status === 401 && !form.matches("#login")) return void location.reload();
  form.dispatchEvent(new CustomEvent("conpaas:refused", { bubbles: true }));
  complain(form, words);
});

document.addEventListener("change", (event) => {
  if (event.target.closest("[data-save-on-change]")) event.target.form.requestSubmit();
  if (event.target.matches("[data-go]")) location.assign(event.target.value);
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !event.target.matches?.(".in-place")) return;
  event.target.value = event.target.defaultValue;
  delete event.target.form.dataset.dirty;
  event.target.blur();
});

document.addEventListener("conpaas:refused", (event) => {
  const name = event.target.querySelector(".in-place");
  if (name) name.value = name.defaultValue;
});

document.addEventListener("click", async (event) => {
  const copy = event.target.closest("[data-copy]");
  if (copy) {
    await navigator.clipboard.writeText(document.getElementById(copy.dataset.copy).textContent);
    toast("copied");
  }
  const toggle = event.target.closest("[data-toggle]");
  if (!toggle) return;
  event.preventDefault();
  for (const form of document.querySelectorAll("#login, #register")) form.hidden = form.id !== toggle.dataset.toggle;
  history.replaceState(null, "", toggle.href);
  document.querySelector(`#${toggle.dataset.toggle} input:not([type=hidden])`).focus();
});

const kept = sessionStorage.getItem("toast");
if (kept) {
  sessionStorage.removeItem("toast");
  toast(kept);
}
