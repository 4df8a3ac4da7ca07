// Prints one number. Usage: node random.mjs [URL] [POOL]. The token comes from TOMBOLA_TOKEN.

import { randomUUID } from "node:crypto";

const TRIES = 10;

/** Returns one number or code as the text that the server sent: JSON.parse would turn 5.100000 into 5.1. */
export async function draw(url, pool, token) {
  // All attempts have the same key, so the server takes only one number.
  const headers = { "idempotency-key": randomUUID() };
  if (token) headers.authorization = `Bearer ${token}`;
  const address = `${url}/random?${new URLSearchParams({ type: pool })}`;
  for (let left = TRIES - 1; ; left -= 1) {
    let wait = 1;
    try {
      const signal = AbortSignal.timeout(10_000);
      const response = await fetch(address, { method: "POST", headers, signal });
      const text = await response.text();
      if (response.ok) return JSON.parse(text).code ?? text.match(/"number":([^,}]+)/)[1];
      if (![429, 503].includes(response.status)) throw new Refused(`${response.status}: ${text}`);
      if (left === 0) throw new Refused(`${response.status}: ${text}`);
      wait = Number(response.headers.get("retry-after") ?? 1);
    } catch (error) {
      // No response arrived, or only a part of it. If a number was taken for it, the next attempt gets it.
      if (error instanceof Refused || left === 0) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, wait * 1000));
  }
}

class Refused extends Error {}

const [url = "http://127.0.0.1:8000", pool = "int"] = process.argv.slice(2);
try {
  console.log(await draw(url, pool, process.env.TOMBOLA_TOKEN));
} catch (error) {
  console.error(`${error.message}`);
  process.exitCode = 1;
}
