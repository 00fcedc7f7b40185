// A log that is followed: lines are only ever added at its end.
import { problem } from "./toast.js";

const KEPT = 5000; // lines
const ALWAYS = new Set(["event", "level", "timestamp", "service", "instance"]);

const room = document.getElementById("log-text");
if (room) follow(room);

function follow(place) {
  const wanted = () => document.getElementById("log-follow")?.checked ?? true;
  const source = new EventSource(place.dataset.source);
  let rest = "";
  source.addEventListener("log", (event) => {
    const lines = (rest + JSON.parse(event.data)).split("\n");
    rest = lines.pop();
    place.append(...lines.map(shown));
    while (place.childNodes.length > KEPT) place.firstChild.remove();
    if (wanted()) place.scrollTop = place.scrollHeight;
  });
  source.addEventListener("problem", (event) => {
    problem(JSON.parse(event.data));
    source.close();
  });
  source.addEventListener("open", () => {
    rest = "";
    place.replaceChildren(); // each connection begins with the end of the log
  });
  place.addEventListener("wheel", (event) => {
    const box = document.getElementById("log-follow");
    if (box && event.deltaY < 0) box.checked = false;
  });
}

/** A line of a daemon of ours is a JSON object: show it as time, level, event and the rest; any other as it is. */
function shown(line) {
  const place = document.createElement("span");
  const words = read(line);
  if (!words) {
    place.textContent = `${line}\n`;
    return place;
  }
  place.className = words.level ?? "";
  const time = Object.assign(document.createElement("time"), {
    textContent: String(words.timestamp ?? "").slice(11, 23),
  });
  time.title = words.timestamp ?? "";
  const event = Object.assign(document.createElement("b"), { textContent: words.event });
  const rest = Object.entries(words).filter(([name, value]) => !ALWAYS.has(name) && value !== "");
  place.append(
    time,
    ` ${(words.level ?? "").padEnd(7)} `,
    event,
    ` ${rest.map(([name, value]) => `${name}=${text(value)}`).join(" ")}\n`,
  );
  return place;
}

function read(line) {
  if (!line.startsWith("{")) return null;
  try {
    const words = JSON.parse(line);
    return typeof words.event === "string" ? words : null;
  } catch {
    return null; // not one of ours after all
  }
}

const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
