// The page as a whole: asking for it again and putting what changed into place.
import { Idiomorph } from "./vendor/idiomorph/idiomorph.esm.js";

let asking = null;
let again = false;

/** Ask for the page and morph it into place. Calls while one is under way make it ask once more. */
export function refresh() {
  if (asking) {
    again = true;
    return asking;
  }
  asking = ask().finally(() => {
    asking = null;
    if (again) {
      again = false;
      refresh();
    }
  });
  return asking;
}

async function ask() {
  const response = await fetch(location.href, { headers: { "X-Part": "page" }, cache: "no-store" }).catch(() => null);
  if (response === null) return; // no connection: live.js says so and asks again when it is back
  if (response.status === 401) return void location.reload();
  if (response.status === 404 && location.pathname.startsWith("/services/")) return void location.assign("/");
  if (!response.ok) return;
  const part = new DOMParser().parseFromString(await response.text(), "text/html").getElementById("page");
  if (part !== null) put(part);
}

function put(part) {
  Idiomorph.morph(document.getElementById("page"), part, {
    ignoreActiveValue: true,
    callbacks: {
      beforeNodeMorphed: (old) => !kept(old),
      beforeNodeRemoved: (old) => !(old instanceof HTMLDialogElement && old.open),
      beforeAttributeUpdated: (name, old) =>
        !(name === "open" || name === "aria-busy") || !(old instanceof HTMLElement),
    },
  });
  document.title = `${document.getElementById("page").dataset.title} · ConPaaS`;
  document.dispatchEvent(new Event("conpaas:morphed"));
}

/** What people are working on, and what scripts have filled, stays as it is. */
function kept(node) {
  if (!(node instanceof Element)) return false;
  return node.matches("[data-keep], form[data-dirty], dialog[open]");
}

document.addEventListener("input", (event) => {
  const form = event.target.closest("form");
  if (form) form.dataset.dirty = "";
});

/** Make an element with an icon of the sprite. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `${document.querySelector("meta[name=icons]").content}#${name}`);
  svg.append(use);
  return svg;
}
