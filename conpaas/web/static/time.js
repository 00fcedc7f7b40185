// "11 minutes ago", kept true while the page is open. The words are those of conpaas/core/units.py.
const STEPS = [
  [86400, "day"],
  [3600, "hour"],
  [60, "minute"],
];

export function ago(seconds) {
  for (const [size, word] of STEPS) {
    const count = Math.floor(seconds / size);
    if (count > 0) return `${count} ${word}${count === 1 ? "" : "s"} ago`;
  }
  return "a few moments ago";
}

function update() {
  for (const time of document.querySelectorAll("time[datetime]")) {
    const words = ago((Date.now() - Date.parse(time.dateTime)) / 1000);
    if (time.textContent !== words) time.textContent = words;
  }
}

setInterval(update, 10_000);
