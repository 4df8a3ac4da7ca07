// The charts of the last five minutes. The value of a point is shown at the pointer, or with the arrow keys.

import { $, put, set } from "./dom.js";
import { clock, latency, rate } from "./format.js";

const MINUS = "−";

const HEIGHT = 192;
const TOP = 14;
const BOTTOM = HEIGHT - 24;
const LEFT = 60;
const END = 40;

function svg(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Up to four steps of 1, 2 or 5 times a power of ten, from 0 to at least the highest value.
function linearScale(highest) {
  const top = Math.max(highest, 4);
  const power = 10 ** Math.floor(Math.log10(top / 4));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((step) => 4 * step >= top);
  const ticks = [0, 1, 2, 3, 4].map((count) => count * step).filter((tick) => tick < top + step);
  return { ticks, place: (value) => value / ticks.at(-1) };
}

// Powers of ten, from the lowest value or below to the highest or above.
function powerScale(lowest, highest) {
  const first = Math.floor(Math.log10(lowest));
  const last = Math.max(first + 1, Math.ceil(Math.log10(highest)));
  const ticks = Array.from({ length: last - first + 1 }, (_, index) => 10 ** (first + index));
  return { ticks, place: (value) => (Math.log10(value) - first) / (last - first) };
}

// The runs of values without null between them, as points.
function runs(values, x, y) {
  const runs = [[]];
  values.forEach((value, index) => {
    if (value === null) runs.push([]);
    else runs.at(-1).push([x(index), y(value)]);
  });
  return runs.filter((run) => run.length);
}

const path = (points) => points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// The points of a full chart.
const POINTS = 60;

// The chosen point of each chart, counted from the newest one.
const chosen = { "rate-chart": null, "latency-chart": null };

// The figures of the last response, and the time at which it arrived.
let history = null;
let heard = null;

// Shows the figures of a response.
export function showHistory(figures, at) {
  history = figures;
  heard = at;
  renderCharts();
}

// Chooses a point by the pointer's place or with the arrow keys.
function choose(frame, back) {
  const last = (history?.numbers_per_second.length ?? 0) - 1;
  chosen[frame.id] = back === null || last < 0 ? null : Math.min(Math.max(0, back), last);
  renderCharts();
}

function onPointer(frame, event) {
  const { left, width } = frame.getBoundingClientRect();
  const right = width - END;
  choose(frame, Math.round(((right - (event.clientX - left)) / (right - LEFT)) * (POINTS - 1)));
}

function onKey(frame, event) {
  const back = chosen[frame.id] ?? 0;
  const to = { ArrowLeft: back + 1, ArrowRight: back - 1, Home: POINTS, End: 0, Escape: null }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(frame, to);
}

for (const id of Object.keys(chosen)) {
  for (const kind of ["pointerdown", "pointermove"]) $(id).addEventListener(kind, (event) => onPointer($(id), event));
  // A finger leaves when it is lifted, and the value of a tap has to stay. It goes with the focus.
  $(id).addEventListener("pointerleave", (event) => event.pointerType !== "touch" && choose($(id), null));
  $(id).addEventListener("pointercancel", () => choose($(id), null));
  $(id).addEventListener("keydown", (event) => onKey($(id), event));
  $(id).addEventListener("blur", () => choose($(id), null));
}

// The text of a chart's chosen point.
function pointText(back, lines, read) {
  const at = clock(new Date(heard - back * history.step_seconds * 1000));
  const texts = lines.map(({ values, name }) => `${name ? `${name} ` : ""}${read(values.at(-1 - back) ?? null)}`);
  return `${at}: ${texts.join(", ")}`;
}

function chart(frame, label, scale, write, read, lines) {
  const width = frame.clientWidth;
  const right = width - END;
  const step = history.step_seconds;
  const y = (value) => BOTTOM - scale.place(value) * (BOTTOM - TOP);
  const parts = [];
  for (const tick of scale.ticks) {
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: right, y1: y(tick), y2: y(tick) }));
    parts.push(svg("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, write(tick)));
  }
  const minutes = Math.round((POINTS * step) / 60);
  const every = width < 480 ? 2 : 1;
  for (let minute = 0; minute <= minutes; minute += every) {
    const x = right - ((minute * 60) / (POINTS * step)) * (right - LEFT);
    parts.push(svg("text", { x, y: HEIGHT - 4, "text-anchor": "middle" }, minute ? `${MINUS}${minute} min` : "now"));
  }
  let above = null;
  lines.forEach(({ values, name }, index) => {
    const of = index ? " second" : "";
    const x = (at) => right - ((values.length - 1 - at) / (POINTS - 1)) * (right - LEFT);
    for (const points of runs(values, x, y)) {
      if (lines.length === 1) {
        const [from, to] = [points[0][0], points.at(-1)[0]].map((x) => x.toFixed(1));
        parts.push(svg("path", { class: "area", d: `${path(points)}L${to} ${BOTTOM}L${from} ${BOTTOM}Z` }));
      }
      parts.push(svg("path", { class: `line${of}`, d: path(points) }));
      // Marks the end. Without it, a run of one point would be invisible.
      const [cx, cy] = points.at(-1);
      parts.push(svg("circle", { class: `dot${of}`, cx, cy, r: 3 }));
    }
    const end = values.at(-1);
    if (name && end !== null && end !== undefined) {
      const at = above === null ? y(end) : Math.min(y(end), above - 14);
      above = at;
      parts.push(svg("text", { class: `end${of}`, x: right + 8, y: at + 4 }, name));
    }
  });
  const back = chosen[frame.id];
  if (back !== null) {
    const x = right - (back / (POINTS - 1)) * (right - LEFT);
    parts.push(svg("line", { class: "chosen", x1: x, x2: x, y1: TOP, y2: BOTTOM }));
  }
  const text = back === null ? "" : pointText(back, lines, read);
  put(frame.nextElementSibling, text || "Point at the chart or use the arrow keys to read a value.");
  set(frame, "aria-label", label);
  set(frame, "aria-valuemin", -Math.max(0, lines[0].values.length - 1) * step);
  set(frame, "aria-valuemax", 0);
  set(frame, "aria-valuenow", -(back ?? 0) * step);
  set(frame, "aria-valuetext", text || label);
  frame.replaceChildren(...parts);
}

function renderCharts() {
  if (!history || $("charts").hidden) return;
  const { numbers_per_second: numbers, p50_seconds: p50, p99_seconds: p99 } = history;
  const highest = Math.max(0, ...numbers.filter((value) => value !== null));
  const current = numbers.at(-1) ?? null;
  chart(
    $("rate-chart"),
    `Numbers per second: now ${rate(current)}, at most ${rate(highest)} in the last five minutes`,
    linearScale(highest),
    compact,
    (value) => `${rate(value)} per second`,
    [{ values: numbers }],
  );
  const times = [...p50, ...p99].filter((value) => value > 0);
  chart(
    $("latency-chart"),
    `Server time per request: now p50 ${latency(p50.at(-1) ?? null)}, p99 ${latency(p99.at(-1) ?? null)}`,
    times.length ? powerScale(Math.min(...times), Math.max(...times)) : powerScale(1e-4, 1e-2),
    latency,
    latency,
    [{ values: p50, name: "p50" }, { values: p99, name: "p99" }],
  );
}

const compactly = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });
const compact = (value) => compactly.format(value);

new ResizeObserver(renderCharts).observe($("charts"));
