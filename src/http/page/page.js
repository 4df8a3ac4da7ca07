// The page at `/`: requests /status once a second and shows the response. Data from the server is inserted
// as text and attributes only, never as markup. Tokens are sent in a header, never in a URL.

const POLL_MS = 1000;
// A request that takes longer has failed: the server responds to /status within milliseconds.
const PATIENCE_MS = 5000;
const UNKNOWN = "–";
// The pool of a request without `type`.
const POOL_DEFAULT = "int";
// With more pools, the page shows a filter and folds the pools.
const POOLS_UNFOLDED = 6;
// Names of pools that the first line lists.
const NAMES_LISTED = 3;
// The period of the rate of receipts.
const RATE_MS = 10_000;
const MINUS = "−";
// Events that screen readers announce. The others are too frequent.
const GRAVE = ["damaged", "exhausted", "refill_failed", "receipts_failed"];

const STATES = {
  ok: "serves",
  degraded: "serves, needs attention",
  down: "does not serve",
  in_rotation: "in rotation",
  refilling: "refilling",
  depleted: "depleted",
  damaged: "damaged",
};

const $ = (id) => document.getElementById(id);

// ---- Formatting of numbers

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 2 });

const whole = (number) => (number === null ? UNKNOWN : grouped.format(number));

function rate(number) {
  if (number === null) return UNKNOWN;
  return number > 0 && number < 10 ? short.format(number) : grouped.format(number);
}

// A response time: 0.00012 is 120 µs.
function latency(seconds) {
  if (seconds === null) return UNKNOWN;
  const [factor, unit] = seconds < 1e-3 ? [1e6, "µs"] : seconds < 1 ? [1e3, "ms"] : [1, "s"];
  const digits = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });
  return `${digits.format(seconds * factor)} ${unit}`;
}

// 4000000 is "4 million".
function large(number) {
  const names = [[1e15, "quadrillion"], [1e12, "trillion"], [1e9, "billion"], [1e6, "million"]];
  const [size, name] = names.find(([size]) => number >= size * 0.9995) ?? [1, ""];
  if (number >= 1e18) return "over a quintillion";
  return name ? `${short.format(number / size)} ${name}` : rate(number);
}

// A duration in the largest unit of which it has at least two.
function span(seconds) {
  const units = [[31_557_600, "year"], [86_400, "day"], [3_600, "hour"], [60, "minute"], [1, "second"]];
  const [size, name] = units.find(([size]) => seconds >= 2 * size) ?? units.at(-1);
  const count = Math.floor(seconds / size);
  const text = count >= 1e6 ? large(count) : grouped.format(count);
  return `${text} ${name}${count === 1 ? "" : "s"}`;
}

// Burned numbers are never handed out, so the range is used up if no others are left.
function until(pool) {
  if (pool.pooled + pool.free === 0) return "already used up";
  return pool.seconds_until_used_up === null ? "no numbers are being drawn" : span(pool.seconds_until_used_up);
}

const chance = (share) => (share > 0 ? `1 in ${large(1 / share)}` : "none issued yet");

function percent(share) {
  const of = share * 100;
  if (of > 0 && of < 0.01) return "less than 0.01 %";
  if (of > 99.99 && of < 100) return "more than 99.99 %";
  return `${new Intl.NumberFormat("en-US", { maximumFractionDigits: of < 10 ? 2 : 1 }).format(of)} %`;
}

function bound(number, decimals) {
  if (typeof number === "string") return number;
  const digits = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
  return new Intl.NumberFormat("en-US", digits).format(number);
}

const clock = (date) => date.toLocaleTimeString("en-GB");

// A time, without the day if it is today.
function moment(text) {
  const date = new Date(text);
  const today = date.toDateString() === new Date().toDateString();
  if (today) return clock(date);
  return `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${clock(date)}`;
}

// ---- Updating the page

// Writes a text only if it changes, so that a selection stays and screen readers don't repeat it.
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function set(node, name, value) {
  if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

function element(name, text, attributes = {}) {
  const node = document.createElement(name);
  node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// Makes the children of `list` match these keys, in this order. Existing children are kept.
function keyed(list, keys, make) {
  const old = new Map([...list.children].map((child) => [child.dataset.key, child]));
  keys.forEach((key, index) => {
    let child = old.get(key);
    old.delete(key);
    if (!child) {
      child = make(key);
      child.dataset.key = key;
    }
    if (list.children[index] !== child) list.insertBefore(child, list.children[index] ?? null);
  });
  for (const child of old.values()) child.remove();
  return [...list.children];
}

const copy = (template) => $(template).content.firstElementChild.cloneNode(true);

function fill(bar, share) {
  bar.firstElementChild.style.transform = `scaleX(${Math.min(1, Math.max(0, share))})`;
}

// ---- Tokens: one for each scope, kept for this tab. The one that reads receipts is kept in memory only.

const STORED = { observe: "tombola.observe", draw: "tombola.draw" };
let lookupToken = null;

const given = (scope) => (scope === "lookup" ? lookupToken : sessionStorage.getItem(STORED[scope]));

// One token may have both scopes: it is tried before the page asks for another.
const tokenFor = (scope) => given(scope) ?? (scope === "draw" ? given("observe") : null);

const hasTokens = () => ["observe", "draw", "lookup"].some(given);

function keep(scope, token) {
  if (scope === "lookup") lookupToken = token;
  else sessionStorage.setItem(STORED[scope], token);
  $("forget").hidden = false;
}

function forget(scope) {
  if (scope === "lookup") lookupToken = null;
  else sessionStorage.removeItem(STORED[scope]);
  $("forget").hidden = !hasTokens();
}

const PURPOSES = { observe: "see what this server does", draw: "draw here", lookup: "find a receipt" };

// Why the page asks for a token, and whether a wrong one was given.
function why(status, scope) {
  if (given(scope) && status === 401) return ["This server does not know that token. Check that you copied all of it.", true];
  if (given(scope)) return [`This server knows that token, but its scope is not ${scope}.`, true];
  return [`To ${PURPOSES[scope]}, a token is needed.`, false];
}

function askForToken(form, status, scope) {
  const [text, wrong] = why(status, scope);
  const note = form.querySelector(".why");
  put(note, text);
  note.toggleAttribute("data-wrong", wrong);
  forget(scope);
  form.hidden = false;
}

// Moves the focus to another element if it is in the form, because hiding the form would lose it.
function close(form, next = "draw-one") {
  if (form.contains(document.activeElement)) $(next).focus();
  form.hidden = true;
}

// Calls `use` when a well-formed token is entered.
function onToken(form, scope, use) {
  const input = form.querySelector("input");
  const note = form.querySelector(".why");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const token = input.value.trim();
    input.value = "";
    if (!/^[\x21-\x7e]+$/.test(token)) {
      put(note, "A token is one word of plain letters and digits. Check that you copied nothing else.");
      note.toggleAttribute("data-wrong", true);
      return;
    }
    keep(scope, token);
    use();
  });
}

// ---- Requests to the server

function ask(target, scope) {
  const token = scope && tokenFor(scope);
  return fetch(new URL(target, document.baseURI), {
    cache: "no-store",
    headers: token ? { Authorization: `Bearer ${token}` } : {},
    signal: AbortSignal.timeout(PATIENCE_MS),
  });
}

let heard = null;
let timer = null;
let asking = false;
let due = false;

async function poll() {
  clearTimeout(timer);
  due = asking;
  if (asking) return;
  asking = true;
  let again = true;
  try {
    again = await look();
  } finally {
    asking = false;
    if (due) poll();
    else if (again && !document.hidden) timer = setTimeout(poll, POLL_MS);
  }
}

// Requests /status and shows it. Returns whether to poll again.
async function look() {
  let answer, text;
  try {
    answer = await ask("status", "observe");
    text = await answer.text();
  } catch {
    gone("No response from the server");
    return true;
  }
  const body = parse(text);
  if (answer.ok && body) {
    heard = new Date();
    gone(null);
    render(body);
    return true;
  }
  if (answer.status === 401 || answer.status === 403) {
    gone(null);
    await lock(answer.status);
    return false;
  }
  gone(`The server has responded with ${answer.status}${body?.error ? ` (${body.error})` : ""}`);
  return true;
}

// The parsed text, or null if it is not JSON, such as an error page of a proxy.
function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if ($("observe").hidden) poll();
});

// Shows what is wrong and since when. With null it hides the message.
let wrongSince = null;
function gone(what) {
  document.body.classList.toggle("stale", what !== null);
  $("banner").hidden = what === null;
  if (what === null) {
    wrongSince = null;
    return;
  }
  wrongSince ??= heard ?? new Date();
  put($("banner"), `${what} since ${clock(wrongSince)}. Trying again every second.`);
  put($("state"), "no response");
  set($("state"), "data-is", "down");
  document.title = "tombola: no response";
}

// Without a token, the page shows only the pools to draw from.
async function lock(status) {
  askForToken($("observe"), status, "observe");
  for (const id of ["now", "charts", "receipt-facts", "receipt-trouble", "filter", "history"]) $(id).hidden = true;
  $("pools").replaceChildren();
  document.querySelector("main").classList.add("locked");
  put($("state"), "a token is needed");
  set($("state"), "data-is", "");
  put($("build"), "");
  document.title = "tombola: a token is needed";
  // /health needs no token and has the names of the pools.
  const health = await ask("health", null).then((answer) => answer.json()).catch(() => ({ pools: {} }));
  choices(Object.keys(health.pools));
}

// ---- The figures

function render(status) {
  document.querySelector("main").classList.remove("locked");
  for (const id of ["now", "charts", "receipt-facts", "history"]) $(id).hidden = false;

  const pools = Object.entries(status.pools);
  const numbers = pools.reduce((sum, [, pool]) => sum + (pool.issued_per_second ?? 0), 0);
  const ill = pools.filter(([, pool]) => pool.status !== "ok").map(([name]) => name);
  put($("state"), ill.length ? `${several(ill)} ${STATES[status.status]}` : "all pools serve");
  set($("state"), "data-is", status.status);
  put($("build"), `${status.version} · up ${span(status.uptime_seconds)}`);
  document.title = ill.length ? `tombola: check ${several(ill)}` : `tombola: ${rate(numbers)}/s`;

  put($("rate"), rate(numbers));
  put($("requests"), rate(status.requests.per_second));
  put($("p50"), latency(status.requests.p50_seconds));
  put($("p99"), latency(status.requests.p99_seconds));
  put($("connections"), whole(status.connections));

  choices(pools.map(([name]) => name));
  latest = pools;
  renderPools();
  close($("observe"));
  history = status.history;
  renderCharts();
  renderReceipts(status);
  renderEvents(status.events);
}

// A list of names that stays short.
function several(names) {
  const rest = names.length - NAMES_LISTED;
  return rest > 0 ? `${names.slice(0, NAMES_LISTED).join(", ")} and ${rest} more` : names.join(", ");
}

// The pools of the last response, each with its name.
let latest = [];
function renderPools() {
  const text = $("filter-text").value.trim().toLowerCase();
  const isMany = latest.length > POOLS_UNFOLDED;
  $("filter").hidden = !isMany;
  $("pools").classList.toggle("many", isMany);
  const fits = ([name, pool]) => name.includes(text) || STATES[pool.status].includes(text);
  const shown = isMany ? latest.filter(fits) : latest;
  put($("filtered"), `${whole(shown.length)} of ${whole(latest.length)} pools`);
  const cards = keyed($("pools"), shown.map(([name]) => name), (name) => {
    const card = copy("pool-template");
    card.open = !isMany;
    card.addEventListener("toggle", () => {
      const found = latest.find(([other]) => other === name);
      if (found) renderPool(card, ...found);
    });
    return card;
  });
  cards.forEach((card, index) => renderPool(card, ...shown[index]));
}

function renderPool(card, name, pool) {
  const part = (selector) => card.querySelector(selector);
  const { min, max, decimals, size } = pool.range;
  put(part(".name"), name);
  put(part(".state"), pool.reason ? `${STATES[pool.status]}: ${pool.reason}` : STATES[pool.status]);
  set(part(".state"), "data-is", pool.status);
  put(part(".brief"), card.open ? "" : `${whole(pool.pooled)} ready, ${rate(pool.issued_per_second)} per second`);
  put(part(".range"), `${bound(min, decimals)} to ${bound(max, decimals)}`);
  // With hundreds of pools, the hidden parts would take most of the time.
  if (!card.open) return;

  put(part(".issued"), whole(pool.issued));
  put(part(".pooled"), whole(pool.pooled));
  put(part(".free"), whole(pool.free));
  put(part(".burned"), whole(pool.burned));
  put(part(".rate"), pool.issued_per_second === null ? UNKNOWN : `${rate(pool.issued_per_second)} per second`);
  put(part(".until"), until(pool));
  put(part(".chance"), chance(pool.guess_chance));

  const used = pool.issued / size;
  const text = `${percent(used)} of the range is issued`;
  put(part(".share"), text);
  fill(part(".used .bar"), used);
  set(part(".used .bar"), "aria-valuenow", used * 100);
  set(part(".used .bar"), "aria-valuetext", text);

  const rows = keyed(part(".shards"), pool.shards.map((shard) => shard.name), () => copy("shard-template"));
  rows.forEach((row, index) => renderShard(row, pool.shards[index]));
}

function renderShard(row, shard) {
  const part = (selector) => row.querySelector(selector);
  const rows = shard.rows || shard.size;
  const left = `${whole(shard.left)} of ${whole(rows)} left`;
  set(row, "data-is", shard.state);
  put(part(".name"), shard.name);
  put(part(".state"), STATES[shard.state]);
  set(part(".state"), "data-is", shard.state);
  const isStarter = rows < shard.size;
  put(part(".left"), isStarter ? `Starter supply: ${left}. A full generation has ${whole(shard.size)}` : left);
  fill(part(".level"), shard.left / rows);
  set(part(".level"), "data-starter", isStarter);
  set(part(".level"), "aria-label", shard.name);
  set(part(".level"), "aria-valuemax", rows);
  set(part(".level"), "aria-valuenow", shard.left);
  set(part(".level"), "aria-valuetext", left);
  fill(part(".next"), shard.standby ? 1 : shard.progress ?? 0);
  const generation = shard.generation === null ? "No generation" : `Generation ${shard.generation}`;
  put(part(".coming"), `${generation}, the next ${next(shard)}`);
  put(part(".last"), last(shard.last_refill));
}

function next(shard) {
  if (shard.standby) return "is ready";
  return shard.progress === null ? "is not started" : `is ${percent(shard.progress)} built`;
}

function last(refill) {
  if (!refill) return "Not refilled since the start";
  if (refill.outcome === "failed") return `The last refill failed at ${moment(refill.at)}`;
  return `Last refilled at ${moment(refill.at)} in ${latency(refill.seconds)}`;
}

// The counts of receipts of the last responses, oldest first.
let saved = [];
function renderReceipts({ receipts, started_at: start, time }) {
  const now = { start, at: Date.parse(time), count: receipts.keyed + receipts.unkeyed };
  saved = [...saved.filter((one) => one.start === start && now.at - one.at <= RATE_MS), now];
  const [{ at, count }] = saved;
  put($("receipt-rate"), rate(now.at > at ? ((now.count - count) * 1000) / (now.at - at) : null));
  put($("receipt-count"), whole(receipts.count));
  put($("keyed"), whole(receipts.keyed));
  put($("replayed"), whole(receipts.replayed));
  put($("refused"), whole(receipts.refused));
  $("receipt-trouble").hidden = receipts.trouble === null;
  put($("receipt-trouble"), `Receipts can't be saved: ${receipts.trouble}`);
}

// The time of the newest event that was shown. Ids start again with the server; times (RFC 3339, of equal
// width) do not.
let newest = null;
function renderEvents(events) {
  const rows = keyed($("events"), events.map((event) => `${event.at} ${event.id}`), () => element("li", ""));
  rows.forEach((row, index) => {
    if (row.hasChildNodes()) return;
    const { at, kind, pool, shard, message } = events[index];
    const of = shard ?? pool;
    row.append(
      element("time", moment(at), { datetime: at, title: at }),
      element("span", kind.replaceAll("_", " "), { class: "kind", "data-is": kind }),
      element("span", of && !message.includes(of) ? `${of}: ${message}` : message),
    );
  });
  const fresh = events.filter((event) => newest !== null && event.at > newest && GRAVE.includes(event.kind));
  if (fresh.length) put($("announce"), fresh.map((event) => event.message).join(" "));
  newest = events[0]?.at ?? newest ?? "";
}

// ---- Charts

let history = null;

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
  $(id).addEventListener("pointermove", (event) => onPointer($(id), event));
  $(id).addEventListener("pointerleave", () => choose($(id), null));
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
  set(frame, "aria-valuemin", -(lines[0].values.length - 1) * step);
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

// ---- Drawing

function choices(names) {
  const isFirst = (name) => name === POOL_DEFAULT;
  const ordered = [...names.filter(isFirst), ...names.filter((name) => !isFirst(name))];
  for (const id of ["draw", "receipts"]) $(id).hidden = ordered.length === 0;
  for (const id of ["pool", "lookup-pool"]) {
    keyed($(id), ordered, (name) => element("option", name, { value: name }));
  }
  showCommand();
}

const target = () => `random?type=${encodeURIComponent($("pool").value)}`;

// The token itself is not shown, because the screen may be public.
function showCommand() {
  const token = tokenFor("draw") || !$("draw-ask").hidden;
  const header = token ? `-H "Authorization: Bearer $TOKEN" ` : "";
  put($("curl"), `curl ${header}'${new URL(target(), document.baseURI)}'`);
}

let drawing = false;
async function draw() {
  if (drawing) return;
  drawing = true;
  set($("draw-one"), "aria-disabled", true);
  const started = performance.now();
  try {
    const answer = await ask(target(), "draw");
    const text = await answer.text();
    const took = latency((performance.now() - started) / 1000);
    if (answer.status === 401 || answer.status === 403) {
      askForToken($("draw-ask"), answer.status, "draw");
      $("answer").hidden = true;
      put($("outcome"), "No number was drawn.");
      $("draw-token").focus();
    } else {
      close($("draw-ask"));
      const retry = answer.headers.get("Retry-After");
      put($("outcome"), `${outcome(answer.status)}${retry ? ` Ask again in ${span(Number(retry))}.` : ""} Status ${answer.status}, ${took}.`);
      put($("answer"), text);
      $("answer").hidden = false;
    }
  } catch {
    $("answer").hidden = true;
    put($("outcome"), "No response from the server. A number may have been drawn; if so, it is never handed out again.");
  }
  showCommand();
  put($("copied"), "");
  drawing = false;
  $("draw-one").removeAttribute("aria-disabled");
}

const outcome = (status) => (status === 200 ? "Drawn." : "No number was drawn.");

// ---- Finding a receipt

async function find() {
  const [pool, number] = [$("lookup-pool").value, $("number").value.trim()];
  $("receipt").hidden = true;
  put($("found"), "");
  if (!number) return;
  let answer, text;
  try {
    answer = await ask(`receipts/${encodeURIComponent(pool)}/${encodeURIComponent(number)}`, "lookup");
    text = await answer.text();
  } catch {
    put($("found"), "No response from the server.");
    return;
  }
  if (answer.status === 401 || answer.status === 403) {
    askForToken($("lookup-ask"), answer.status, "lookup");
    $("lookup-token").focus();
    return;
  }
  close($("lookup-ask"), "number");
  const body = parse(text);
  if (answer.ok && body) {
    const label = body.label === null ? "" : `, labelled ${body.label}`;
    put($("found"), `Receipt ${whole(body.seq)}: drawn at ${moment(body.at)}${body.owner ? ` by ${body.owner}` : ""}${label}.`);
    put($("receipt"), text.trim());
    $("receipt").hidden = false;
  } else if (answer.status === 404) {
    put($("found"), `No receipt that you may see has ${number} of the pool ${pool}.`);
  } else {
    put($("found"), body?.message ?? body?.error ?? `The server has responded with ${answer.status}.`);
  }
}

async function copyCommand() {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    put($("copied"), "Copied.");
  } catch {
    // Browsers give no clipboard access to a page that was loaded over http from another machine.
    getSelection().selectAllChildren($("curl"));
    put($("copied"), "Selected. Copy it with Ctrl+C.");
  }
}

$("draw-one").addEventListener("click", draw);
$("copy").addEventListener("click", copyCommand);
$("pool").addEventListener("change", showCommand);
$("lookup").addEventListener("submit", (event) => {
  event.preventDefault();
  find();
});
$("filter").addEventListener("submit", (event) => event.preventDefault());
$("filter-text").addEventListener("input", renderPools);
onToken($("observe"), "observe", poll);
onToken($("draw-ask"), "draw", draw);
onToken($("lookup-ask"), "lookup", find);
$("forget").addEventListener("click", () => {
  for (const scope of ["observe", "draw", "lookup"]) forget(scope);
  for (const id of ["draw-ask", "lookup-ask", "answer", "receipt"]) $(id).hidden = true;
  put($("found"), "");
  put($("outcome"), "The tokens have been forgotten.");
  poll();
});
$("forget").hidden = !hasTokens();
poll();
