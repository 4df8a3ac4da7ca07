// Prints one number. Usage: node random.mjs [URL] [POOL], a token in TOMBOLA_TOKEN.

const TRIES = 10;

/** One number, as the text that came: JSON.parse would make 5.1 of 5.100000. */
export async function draw(url, pool, token) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const address = `${url}/random?${new URLSearchParams({ type: pool })}`;
  for (let left = TRIES - 1; ; left -= 1) {
    let wait = 1;
    try {
      const answer = await fetch(address, { headers, signal: AbortSignal.timeout(10_000) });
      const text = await answer.text();
      if (answer.ok) return text.match(/"number":([^,}]+)/)[1];
      if (![429, 503].includes(answer.status)) throw new Refused(`${answer.status}: ${text}`);
      if (left === 0) throw new Refused(`${answer.status}: ${text}`);
      wait = Number(answer.headers.get("retry-after") ?? 1);
    } catch (error) {
      // No answer came: the number that may have been on its way never comes again.
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
