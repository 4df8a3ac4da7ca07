#!/usr/bin/env python3
"""Prints one number. Usage: random_number.py [URL] [POOL]. The token comes from TOMBOLA_TOKEN.

This is for a script without dependencies. For a program, use the package in clients/python.
"""

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

TRIES = 10


def draw(url: str, pool: str, token: str | None = None) -> str:
    """Returns one number or code as the text that the server sent: 5.100000, not 5.1."""
    query = urllib.parse.urlencode({"type": pool})
    request = urllib.request.Request(f"{url}/random?{query}", method="POST")
    # All attempts have the same key, so the server takes only one number.
    request.add_header("Idempotency-Key", str(uuid.uuid4()))
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    for left in reversed(range(TRIES)):
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                body = json.load(response, parse_int=str, parse_float=str)
                return body["code"] if "code" in body else body["number"]
        except urllib.error.HTTPError as refused:
            if refused.code not in (429, 503) or left == 0:
                raise SystemExit(f"{refused.code}: {refused.read().decode()}") from refused
            time.sleep(int(refused.headers.get("Retry-After", 1)))
        except (OSError, http.client.HTTPException) as lost:
            # No response arrived, or only a part of it. If a number was taken for it, the next attempt gets it.
            if left == 0:
                raise SystemExit(f"no response from {url}: {lost}") from lost
            time.sleep(1)
    raise AssertionError("the last try returns or ends")


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    pool = sys.argv[2] if len(sys.argv) > 2 else "int"
    print(draw(url, pool, os.environ.get("TOMBOLA_TOKEN")))
