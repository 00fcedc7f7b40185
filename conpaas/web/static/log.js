// A log that is followed: text is only ever added at its end.
import { problem } from "./toast.js";

const KEPT = 500_000; // characters

const room = document.getElementById("log-text");
if (room) follow(room);

function follow(place) {
  const wanted = () => document.getElementById("log-follow")?.checked ?? true;
  const source = new EventSource(place.dataset.source);
  source.addEventListener("log", (event) => {
    place.append(JSON.parse(event.data));
    while (place.textContent.length > KEPT && place.childNodes.length > 1) place.firstChild.remove();
    if (wanted()) place.scrollTop = place.scrollHeight;
  });
  source.addEventListener("problem", (event) => {
    problem(JSON.parse(event.data));
    source.close();
  });
  source.addEventListener("open", () => place.replaceChildren()); // each connection begins with the end of the log
  place.addEventListener("wheel", (event) => {
    const box = document.getElementById("log-follow");
    if (box && event.deltaY < 0) box.checked = false;
  });
}
