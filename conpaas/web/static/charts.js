// Charts of what the service measures. New points come with the live events.
import uPlot from "./vendor/uplot/uPlot.esm.js";

const HEIGHT = 120;
const KNOWN = [
  { title: "requests", unit: "/s", lines: { request_rate: "requests" } },
  {
    title: "response time",
    unit: "ms",
    lines: { response_p50: "half of all", response_p95: "95 %", response_p99: "99 %" },
  },
  { title: "errors", unit: "/s", lines: { error_rate: "errors" }, hue: 3 },
  { title: "throughput", unit: "B/s", lines: { throughput: "throughput" }, hue: 1 },
  { title: "processor", unit: "core", lines: { cpu: "cpu" }, hue: 2 },
  { title: "memory", unit: "B", lines: { memory: "memory" }, hue: 5 },
];
const HIDDEN = new Set(["disk_free"]);

const room = document.getElementById("chart-room");
const points = new Map(); // by node: [{ at, values }]
let charts = [];

if (room) begin();

function begin() {
  const minutes = document.getElementById("chart-minutes");
  const node = document.getElementById("chart-node");
  minutes.addEventListener("change", load);
  node.addEventListener("change", draw);
  document.addEventListener("conpaas:metrics", (event) => {
    event.detail.forEach(add);
    draw();
  });
  document.addEventListener("conpaas:theme", () => {
    clear();
    draw();
  });
  new ResizeObserver(resize).observe(room);
  load();
}

async function load() {
  const minutes = document.getElementById("chart-minutes").value;
  const response = await fetch(`${room.dataset.source}?minutes=${minutes}`, {
    headers: { Accept: "application/json" },
  }).catch(() => null);
  if (!response?.ok) return; // the next live event brings points
  points.clear();
  (await response.json()).forEach(add);
  draw();
}

function add({ at, node, values }) {
  if (!points.has(node)) points.set(node, []);
  const list = points.get(node);
  const time = Date.parse(at) / 1000;
  if (!list.length || list.at(-1).at < time) list.push({ at: time, values });
}

function recent(node) {
  const from = Date.now() / 1000 - 60 * Number(document.getElementById("chart-minutes").value);
  const list = (points.get(node) ?? []).filter((point) => point.at >= from);
  if (points.has(node)) points.set(node, list);
  return list;
}

function groups(list) {
  const keys = new Set(list.flatMap((point) => Object.keys(point.values)));
  const known = KNOWN.filter((group) => Object.keys(group.lines).some((key) => keys.has(key)));
  const named = new Set(KNOWN.flatMap((group) => Object.keys(group.lines)));
  const others = [...keys].filter((key) => !named.has(key) && !HIDDEN.has(key)).sort();
  return [
    ...known,
    ...others.map((key) => ({ title: key.replaceAll("_", " "), unit: "", lines: { [key]: key }, hue: 4 })),
  ];
}

function draw() {
  const node = document.getElementById("chart-node").value;
  const list = recent(node);
  if (!list.length) return empty();
  const wanted = groups(list);
  const name = `${node} ${wanted.map((group) => group.title).join()}`;
  if (room.dataset.shown !== name) {
    clear();
    room.dataset.shown = name;
    room.replaceChildren();
    charts = wanted.map(make);
  }
  for (const chart of charts) fill(chart, list);
}

function empty() {
  clear();
  room.replaceChildren(
    Object.assign(document.createElement("p"), {
      className: "muted",
      textContent: "No values yet: they come while the service runs.",
    }),
  );
}

function clear() {
  charts.forEach((chart) => chart.plot.destroy());
  charts = [];
  delete room.dataset.shown;
}

function make(group) {
  const place = document.createElement("figure");
  place.className = "chart";
  const title = document.createElement("h3");
  const now = document.createElement("output");
  title.append(group.title, now);
  place.append(title);
  room.append(place);
  const keys = Object.keys(group.lines);
  const plot = new uPlot(options(group, keys, place.clientWidth || 250), [[], ...keys.map(() => [])], place);
  if (keys.length > 1) place.append(legend(group));
  return { group, keys, plot, now };
}

function legend(group) {
  const place = document.createElement("div");
  place.className = "legend";
  Object.values(group.lines).forEach((label, index) => {
    const item = document.createElement("span");
    item.className = `hue-${(group.hue ?? 0) + index}`;
    item.append(document.createElement("i"), label);
    place.append(item);
  });
  return place;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function options(group, keys, width) {
  const axis = {
    stroke: colour("--muted"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { show: false },
  };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    cursor: { drag: { x: false, y: false }, points: { size: 6 } },
    scales: { x: { range: span }, y: { range: (_, low, high) => [Math.min(0, low ?? 0), high > 0 ? high * 1.15 : 1] } },
    axes: [
      { ...axis, size: 26, space: 60, values: timeLabels },
      { ...axis, size: 52, space: 30, values: (_, ticks) => ticks.map((tick) => number(tick, group.unit)) },
    ],
    series: [
      {},
      ...keys.map((_, index) => {
        const stroke = colour(`--hue-${(group.hue ?? 0) + index}`);
        return {
          stroke,
          width: 1.8,
          fill: keys.length === 1 ? `${stroke}22` : undefined,
          points: { show: (_, __, first, last) => last - first < 3 },
          spanGaps: true,
        };
      }),
    ],
    hooks: { setCursor: [hover] },
  };
}

/** The time that is shown: up to now, from the first point on, at least two minutes, at most what was chosen. */
function span(_, first) {
  const now = Date.now() / 1000;
  const window = 60 * Number(document.getElementById("chart-minutes").value);
  return [Math.max(now - window, Math.min(first ?? now, now - 120)), now];
}

function timeLabels(_, ticks) {
  const short = ticks.length > 1 && ticks[1] - ticks[0] < 60;
  return ticks.map((tick) =>
    new Date(tick * 1000).toLocaleTimeString([], {
      hour: "2-digit",
      minute: "2-digit",
      second: short ? "2-digit" : undefined,
      hour12: false,
    }),
  );
}

function fill(chart, list) {
  const times = list.map((point) => point.at);
  chart.plot.setData([times, ...chart.keys.map((key) => list.map((point) => point.values[key] ?? null))]);
  say(chart, list.length - 1);
}

function hover(plot) {
  const chart = charts.find((one) => one.plot === plot);
  if (chart) say(chart, plot.cursor.idx ?? plot.data[0].length - 1);
}

function say({ plot, keys, group, now }, index) {
  const values = keys.map((_, line) => plot.data[line + 1][index]);
  now.textContent = values.every((value) => value == null)
    ? ""
    : `${values.map((value) => (value == null ? "–" : number(value, group.unit))).join(" · ")}${scaled(group.unit) ? "" : ` ${group.unit}`}`;
}

const scaled = (unit) => unit.startsWith("B");

function number(value, unit) {
  if (!scaled(unit)) return value >= 100 ? String(Math.round(value)) : String(Number(value.toPrecision(2)));
  let power = 0;
  let left = value;
  while (left >= 1024 && power < 4) {
    left /= 1024;
    power += 1;
  }
  return `${left >= 100 ? Math.round(left) : Number(left.toPrecision(2))} ${["", "K", "M", "G", "T"][power]}${unit}`;
}

function resize() {
  for (const { plot } of charts) {
    const width = plot.root.parentElement.clientWidth;
    if (width && width !== plot.width) plot.setSize({ width, height: HEIGHT });
  }
}
