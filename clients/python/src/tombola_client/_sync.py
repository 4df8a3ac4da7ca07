"""The client that blocks. Only sends and waits; `_protocol` decides what and how long."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Optional, TypeVar, cast

import httpx

from tombola_client._protocol import (
    DEFAULT_DEADLINE,
    DEFAULT_PART_SIZE,
    DEFAULT_TIMEOUT,
    DEFAULT_URL,
    Attempt,
    Bulk,
    Draw,
    Endpoint,
    Outcome,
    Receipt,
    Steps,
    Value,
)

T = TypeVar("T")


class Client:
    """Draws numbers and codes from a tombola server. Threads can share it, and so can forked processes.

    - `base_url`: the address of the server, with the path of a proxy if there is one.
    - `token`: sent as `Authorization: Bearer`.
    - `timeout`: how many seconds an attempt may wait for a connection or for more data.
    - `deadline`: after how many seconds no further attempt begins. It applies to each request, so a draw in
      several parts may take longer.
    - `idempotent`: with `False`, no keys are made. This is for servers and pools without receipts; a lost
      response then loses its numbers.
    - `http`: the `httpx.Client` to use, for example with a certificate authority or a proxy of your own. You
      close it. Forked processes must not share it.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        token: Optional[str] = None,
        timeout: float = DEFAULT_TIMEOUT,
        deadline: float = DEFAULT_DEADLINE,
        idempotent: bool = True,
        http: Optional[httpx.Client] = None,
    ) -> None:
        self._endpoint = Endpoint(base_url, token, timeout, deadline, idempotent)
        self._owns_http = http is None
        self._http = httpx.Client() if http is None else http
        self._process = os.getpid()

    def draw(self, pool: str = "int", *, key: Optional[str] = None, label: Optional[str] = None) -> Value:
        """Returns one number or code."""
        return self.draw_details(pool, key=key, label=label).values[0]

    def draw_details(
        self,
        pool: str = "int",
        count: Optional[int] = None,
        *,
        key: Optional[str] = None,
        label: Optional[str] = None,
    ) -> Draw:
        """Draws with one request, and returns the values with their shards and the key.

        Without `count`, it draws one value. The server limits `count`, by default to 10,000.
        """
        return self._run(self._endpoint.draw(pool, count, key, label))

    def draw_many(
        self,
        count: int,
        pool: str = "int",
        *,
        key: Optional[str] = None,
        label: Optional[str] = None,
        part_size: int = DEFAULT_PART_SIZE,
    ) -> list[Value]:
        """Returns `count` numbers or codes.

        They are drawn in parts of at most `part_size`, and less if the server allows less, with the keys
        `key/1`, `key/2` and so on. After an error, the same call with `key=error.key` gets the parts that
        were drawn, and draws the others.
        """
        return list(self.iter_many(count, pool, key=key, label=label, part_size=part_size))

    def iter_many(
        self,
        count: int,
        pool: str = "int",
        *,
        key: Optional[str] = None,
        label: Optional[str] = None,
        part_size: int = DEFAULT_PART_SIZE,
    ) -> Iterator[Value]:
        """Iterates over `count` numbers or codes, like `draw_many` with one part in memory at a time."""
        bulk = Bulk(self._endpoint, count, pool, key, label, part_size)
        return self._parts(bulk)

    def receipt(self, pool: str, value: Value) -> Receipt:
        """Returns the receipt of a number or code, or raises `NoReceipt`."""
        return self._run(self._endpoint.receipt(pool, value))

    def close(self) -> None:
        """Closes the connections, unless they belong to the `httpx.Client` that was passed."""
        if self._owns_http:
            self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._endpoint.base_url!r})"

    def _parts(self, bulk: Bulk) -> Iterator[Value]:
        while bulk.remaining:
            yield from self._run(bulk.next_part())

    def _run(self, steps: Steps[T]) -> T:
        try:
            attempt = next(steps)
            while True:
                attempt = steps.send(self._make(attempt))
        except StopIteration as done:
            return cast(T, done.value)

    def _make(self, attempt: Attempt) -> Outcome:
        time.sleep(attempt.wait)
        if self._owns_http and self._process != os.getpid():
            # After a fork, two processes would read from the same connections, and get each other's numbers.
            self._http = httpx.Client()
            self._process = os.getpid()
        try:
            return self._http.send(attempt.request(self._http), follow_redirects=False)
        except httpx.RequestError as error:
            return error
