// Keeps the page as things are: told that something changed, it asks for itself again.
import { refresh } from "./page.js";
import { problem, toast } from "./toast.js";

const QUIET_MS = 120; // events come in bunches
let source = null;
let waiting = null;
let lost = false;
const told = new Set(); // operations whose end was shown
const page = () => document.getElementById("page");

function soon() {
  waiting ??= setTimeout(() => {
    waiting = null;
    refresh();
  }, QUIET_MS);
}

function connect() {
  const address = page().dataset.live;
  if (!address || source || document.hidden) return;
  source = new EventSource(address);
  source.addEventListener("open", () => {
    document.getElementById("offline").hidden = true;
    if (lost) soon();
    lost = false;
  });
  source.addEventListener("error", () => {
    if (!lost) document.getElementById("offline").hidden = false;
    lost = true;
    if (source.readyState === EventSource.CLOSED) retry();
  });
  source.addEventListener("change", soon);
  source.addEventListener("credits", (event) => {
    document.getElementById("credits").textContent = event.data;
    soon();
  });
  source.addEventListener("metrics", (event) => {
    document.dispatchEvent(new CustomEvent("conpaas:metrics", { detail: JSON.parse(event.data) }));
  });
  source.addEventListener("operation", (event) => {
    const { id, state, kind, message } = JSON.parse(event.data);
    soon();
    if (told.has(id)) return;
    told.add(id);
    if (state === "FAILED") toast(`${kind} failed`, { hint: message, bad: true });
    else toast(state === "CANCELLED" ? `${kind}: cancelled` : `${kind}: done`);
  });
  source.addEventListener("problem", (event) => problem(JSON.parse(event.data)));
  source.addEventListener("reload", () => location.reload());
}

function disconnect() {
  source?.close();
  source = null;
}

function retry() {
  disconnect();
  setTimeout(connect, 2000);
}

// A browser opens few connections to one host: pages that nobody sees let go of theirs.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return disconnect();
  connect();
  if (page().dataset.live) soon();
});
addEventListener("pagehide", disconnect);

const period = Number(page().dataset.refresh);
if (period) setInterval(() => document.hidden || refresh(), period * 1000);
connect();
