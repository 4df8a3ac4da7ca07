// Writes numbers, rates, durations and times for people. Knows nothing of the page.

export const UNKNOWN = "–";

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 2 });

export const whole = (number) => (number === null ? UNKNOWN : grouped.format(number));

export function rate(number) {
  if (number === null) return UNKNOWN;
  return number > 0 && number < 10 ? short.format(number) : grouped.format(number);
}

// A short duration: 0.00012 is 120 µs.
export function latency(seconds) {
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
export function span(seconds) {
  const units = [[31_557_600, "year"], [86_400, "day"], [3_600, "hour"], [60, "minute"], [1, "second"]];
  const [size, name] = units.find(([size]) => seconds >= 2 * size) ?? units.at(-1);
  const count = Math.floor(seconds / size);
  const text = count >= 1e6 ? large(count) : grouped.format(count);
  return `${text} ${name}${count === 1 ? "" : "s"}`;
}

// Burned numbers are never handed out, so the range is used up if no others are left.
export function until(pool) {
  if (pool.pooled + pool.free === 0) return "already used up";
  return pool.seconds_until_used_up === null ? "no numbers are being drawn" : span(pool.seconds_until_used_up);
}

export const chance = (share) => (share > 0 ? `1 in ${large(1 / share)}` : "none issued yet");

export function percent(share) {
  const of = share * 100;
  if (of > 0 && of < 0.01) return "less than 0.01 %";
  if (of > 99.99 && of < 100) return "more than 99.99 %";
  return `${new Intl.NumberFormat("en-US", { maximumFractionDigits: of < 10 ? 2 : 1 }).format(of)} %`;
}

export function bound(number, decimals) {
  if (typeof number === "string") return number;
  const digits = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
  return new Intl.NumberFormat("en-US", digits).format(number);
}

export const clock = (date) => date.toLocaleTimeString("en-GB");

// A time, without the day if it is today.
export function moment(text) {
  const date = new Date(text);
  const today = date.toDateString() === new Date().toDateString();
  if (today) return clock(date);
  return `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${clock(date)}`;
}
