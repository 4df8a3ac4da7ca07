// The page at `/`: requests /status once a second and shows the response. Tokens are sent in a header, never in a URL.

import { showHistory } from "./charts.js";
import { $, copy, element, fill, keyed, put, set } from "./dom.js";
import { UNKNOWN, bound, chance, clock, latency, moment, percent, rate, span, until, whole } from "./format.js";

const POLL_MS = 1000;
// A request that takes longer has failed: the server responds to /status within milliseconds.
const PATIENCE_MS = 5000;
// The pool of a request without `type`.
const POOL_DEFAULT = "int";
// With more pools, the page shows a filter and folds the pools.
const POOLS_UNFOLDED = 6;
// Names of pools that the first line lists.
const NAMES_LISTED = 3;
// The period of the rate of receipts.
const RATE_MS = 10_000;
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
  showHistory(status.history, heard);
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
  const fits = ([name, pool]) => [name, stateText(pool), ...pool.shards.map(({ state }) => STATES[state])]
    .some((part) => part.toLowerCase().includes(text));
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

const stateText = ({ status, reason }) => (reason ? `${STATES[status]}: ${reason}` : STATES[status]);

function renderPool(card, name, pool) {
  const part = (selector) => card.querySelector(selector);
  const { min, max, decimals, size } = pool.range;
  put(part(".name"), name);
  put(part(".state"), stateText(pool));
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
  rows.forEach((row, index) => renderShard(row, pool.shards[index], pool.free));
}

function renderShard(row, shard, free) {
  const part = (selector) => row.querySelector(selector);
  const rows = shard.rows || shard.size;
  const left = `${whole(shard.left)} of ${whole(rows)} left`;
  set(row, "data-is", shard.state);
  put(part(".name"), shard.name);
  put(part(".state"), STATES[shard.state]);
  set(part(".state"), "data-is", shard.state);
  // A first generation is small so that the shard can serve soon, unless the range had no more numbers. Later ones may
  // be small because numbers were imported.
  const isStarter = shard.generation === 1 && rows < shard.size && free >= shard.size;
  const full = rows < shard.size ? `. A full generation has ${whole(shard.size)}` : "";
  put(part(".left"), `${isStarter ? "Starter supply: " : ""}${left}${full}`);
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

// The text to look up. A code may begin or end with a space that is a symbol of its alphabet, a number can't. Without
// /status, the pool's kind is unknown.
function sought(pool) {
  const text = $("number").value;
  const [, known] = latest.find(([name]) => name === pool) ?? [];
  const isNumber = known ? typeof known.range.min === "number" : Number.isFinite(Number(text));
  return isNumber ? text.trim() : text;
}

async function find() {
  const pool = $("lookup-pool").value;
  const number = sought(pool);
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
    put($("found"), body?.error ?? `The server has responded with ${answer.status}.`);
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
