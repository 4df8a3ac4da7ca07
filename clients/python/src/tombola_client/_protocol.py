"""Requests, retries and responses. Knows nothing of sockets, of sleeping or of async.

An operation is a generator. It yields each attempt that is to be made, is sent the outcome of the attempt,
and returns the result. `Client` and `AsyncClient` only make the attempts.
"""

from __future__ import annotations

import json
import random
import re
import time
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any, Callable, Optional, TypeVar, Union
from urllib.parse import quote

import httpx

from tombola_client.errors import (
    BadCount,
    NoResponse,
    ResponseError,
    TombolaError,
    UnexpectedResponse,
    error_class,
)

DEFAULT_URL = "http://127.0.0.1:8000"
# A request with a key may wait 5 s for the database of a fleet's receipts, so this has to be longer.
DEFAULT_TIMEOUT = 10.0
# As long as `tombola draw` waits by default.
DEFAULT_DEADLINE = 60.0
# The count that a server allows by default. `Bulk` uses smaller parts if the server allows less.
DEFAULT_PART_SIZE = 10_000
# The longest key that a server accepts.
KEY_LENGTH_MAX = 255

# The random part of a wait is at most this after the first attempt. It doubles with each attempt up to 6.4 s.
FIRST_BACKOFF = 0.1
BACKOFF_DOUBLINGS = 6

USER_AGENT = f"tombola-client/{version('tombola-client')}"

Value = Union[int, Decimal, str]
T = TypeVar("T")
Outcome = Union[httpx.Response, httpx.RequestError]


@dataclass(frozen=True)
class Draw:
    """The result of one request.

    `values` are `int`, `Decimal` or `str`, depending on the pool. `shards` has the number of values from each
    shard; it is empty if the server's mode has no shards. `key` is the idempotency key, and `replayed` says
    whether an earlier request with this key took the values.
    """

    values: list[Value]
    shards: dict[str, int]
    key: Optional[str]
    replayed: bool


@dataclass(frozen=True)
class Receipt:
    """The server's record of a response: which values it contained, when, and for whom."""

    seq: int
    at: datetime
    pool: str
    owner: Optional[str]
    token: Optional[str]
    label: Optional[str]
    key_digest: Optional[str]
    values: list[Value]
    digest: str


@dataclass(frozen=True)
class Attempt:
    """A request that is to be sent after `wait` seconds."""

    method: str
    url: str
    params: Mapping[str, str]
    headers: httpx.Headers
    wait: float
    timeout: float

    def request(self, http: Union[httpx.Client, httpx.AsyncClient]) -> httpx.Request:
        """Returns the request with the headers and parameters that `http` adds to all of its requests."""
        return http.build_request(
            self.method, self.url, params=self.params, headers=self.headers, timeout=self.timeout
        )


Steps = Generator[Attempt, Outcome, T]


class Endpoint:
    """One server, with the token, the limits and the clock that are used for all requests to it."""

    def __init__(
        self,
        base_url: str,
        token: Optional[str],
        timeout: float,
        deadline: float,
        idempotent: bool,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        url = httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
            raise ValueError("The base URL is not valid. Use http://HOST:PORT or https://HOST/PATH.")
        if not (timeout > 0 and deadline > 0):
            raise ValueError("The timeout and the deadline must be more than 0 seconds.")
        self.base_url = str(url).rstrip("/")
        # The repr of httpx.Headers hides the value of Authorization.
        self.headers = httpx.Headers({"User-Agent": USER_AGENT, "Accept": "application/json"})
        if token is not None:
            self.headers["Authorization"] = f"Bearer {_header_value('token', token)}"
        self.timeout = timeout
        self.deadline = deadline
        self.idempotent = idempotent
        self.clock = clock
        self.jitter = jitter

    def draw(
        self, pool: str, count: Optional[int] = None, key: Optional[str] = None, label: Optional[str] = None
    ) -> Steps[Draw]:
        """Draws with one request: one value without `count`, otherwise exactly `count`."""
        key = self.key_or_new(key)
        params = {"type": pool}
        if count is not None:
            params["count"] = str(count)
        if label is not None:
            params["label"] = label

        def parse(response: httpx.Response, body: Any) -> Draw:
            values = _values(body)
            if len(values) != (1 if count is None else count):
                raise UnexpectedResponse(f"The response has {len(values)} values instead of {count or 1}.")
            shards = {body["shard"]: 1} if "shard" in body else body.get("shards", {})
            return Draw(values, shards, key, response.headers.get("Idempotent-Replayed") == "true")

        return self._exchange("POST", "/random", parse, params, key)

    def receipt(self, pool: str, value: Value) -> Steps[Receipt]:
        """Looks up the receipt of a number or code."""
        text = format(value, "f") if isinstance(value, Decimal) else str(value)

        def parse(_: httpx.Response, body: Any) -> Receipt:
            return Receipt(
                seq=body["seq"],
                # Before Python 3.11, fromisoformat doesn't accept the Z.
                at=datetime.fromisoformat(body["at"].replace("Z", "+00:00")),
                pool=body["pool"],
                owner=body["owner"],
                token=body["token"],
                label=body["label"],
                key_digest=body["key_digest"],
                values=_values(body),
                digest=body["digest"],
            )

        return self._exchange("GET", f"/receipts/{quote(pool, safe='')}/{quote(text, safe='')}", parse)

    def count_limit(self) -> Steps[int]:
        """Asks the server for the largest count that one request may have."""

        def parse(_: httpx.Response, body: Any) -> int:
            content = body["paths"]["/random"]["post"]["requestBody"]["content"]
            return int(content["application/json"]["schema"]["properties"]["count"]["maximum"])

        return self._exchange("GET", "/openapi.json", parse)

    def key_or_new(self, key: Optional[str]) -> Optional[str]:
        """Returns the caller's key, or a new one unless the client draws without keys."""
        if key is not None:
            return _header_value("key", key)
        return str(uuid.uuid4()) if self.idempotent else None

    def _exchange(
        self,
        method: str,
        path: str,
        parse: Callable[[httpx.Response, Any], T],
        params: Optional[Mapping[str, str]] = None,
        key: Optional[str] = None,
    ) -> Steps[T]:
        """Makes attempts until one succeeds or fails for good, or the deadline leaves no time for another."""
        end = self.clock() + self.deadline
        # Invariant: all attempts have the same key, so the server takes the numbers only once.
        headers = self.headers.copy()
        if key is not None:
            headers["Idempotency-Key"] = key
        attempts, wait, left = 0, 0.0, self.deadline
        while True:
            outcome = yield Attempt(
                method, self.base_url + path, params or {}, headers, wait, min(self.timeout, left)
            )
            attempts += 1
            try:
                return _parsed(outcome, parse)
            except TombolaError as error:
                error.key, error.attempts = key, attempts
                # Invariant: never before the time that the server asked for.
                wait = (error.retry_after or 0.0) + self._backoff(attempts)
                left = end - self.clock() - wait
                if not error.may_retry or left <= 0:
                    raise

    def _backoff(self, attempts: int) -> float:
        # A random wait from 0 on spreads the clients that were refused or cut off together.
        return self.jitter() * FIRST_BACKOFF * float(2 ** min(attempts - 1, BACKOFF_DOUBLINGS))


class Bulk:
    """A draw of any size, in parts with the keys KEY/1, KEY/2 and so on, like those of `tombola draw`.

    With the same key, count and part size, a repetition gets the same values. If the server's limit has
    changed so that the parts differ, the server refuses the keys with `KeyReused`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        count: int,
        pool: str,
        key: Optional[str],
        label: Optional[str],
        part_size: int,
    ) -> None:
        if count < 1 or part_size < 1:
            raise ValueError("The count and the part size must be at least 1.")
        # The server would refuse an empty key, but not the keys of its parts, which others may have used. It
        # would refuse a long key only after the first parts. There are at most as many parts as values.
        key_length_max = KEY_LENGTH_MAX - len(f"/{count}")
        if key is not None and not 1 <= len(key) <= key_length_max:
            raise ValueError(f"The key must have 1 to {key_length_max} characters, so that KEY/{count} fits.")
        self.endpoint = endpoint
        self.remaining = count
        self.pool = pool
        self.key = endpoint.key_or_new(key)
        self.label = label
        self.part_size = part_size
        self.parts = 0

    def next_part(self) -> Steps[list[Value]]:
        """Draws the next part. Makes this part and all later ones smaller if the server allows less."""
        try:
            values = yield from self._allowed_part()
        except TombolaError as error:
            # With this key, the caller can repeat the whole draw.
            error.key = self.key
            raise
        self.parts += 1
        self.remaining -= len(values)
        return values

    def _allowed_part(self) -> Steps[list[Value]]:
        key = None if self.key is None else f"{self.key}/{self.parts + 1}"
        while True:
            count = min(self.remaining, self.part_size)
            try:
                return (yield from self.endpoint.draw(self.pool, count, key, self.label)).values
            except BadCount:
                limit = yield from self.endpoint.count_limit()
                if limit >= count:
                    raise
                self.part_size = limit


def error_from(response: httpx.Response) -> ResponseError:
    """Returns the error that a response with a status of 400 or more describes."""
    code, message = None, response.reason_phrase
    try:
        body = json.loads(response.content)
        code, message = str(body["code"]), str(body["error"])
    except (ValueError, KeyError, TypeError):
        pass  # The response is not from tombola, but from a proxy, or it has no body.
    kind = error_class(response.status_code, code)
    return kind(response.status_code, code, message, _retry_after(response.headers))


def _parsed(outcome: Outcome, parse: Callable[[httpx.Response, Any], T]) -> T:
    if isinstance(outcome, httpx.RequestError):
        raise NoResponse(f"{type(outcome).__name__}: {outcome}".rstrip(": ")) from outcome
    if outcome.status_code >= 400:
        raise error_from(outcome)
    if not (outcome.is_success and outcome.headers.get("Content-Type", "").startswith("application/json")):
        raise UnexpectedResponse(f"The response with status {outcome.status_code} is not from tombola.")
    try:
        body = json.loads(outcome.content, parse_float=Decimal)
    except ValueError as error:
        # Only a part arrived, and a proxy hid that by removing Content-Length.
        raise NoResponse(f"The response is incomplete: {error}") from error
    try:
        return parse(outcome, body)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnexpectedResponse(f"The response is not the one that was expected: {error!r}.") from error


def _values(body: Any) -> list[Value]:
    if "number" in body or "code" in body:
        values = [body["number"] if "number" in body else body["code"]]
    else:
        values = body["numbers"] if "numbers" in body else body["codes"]
    if not all(type(value) in (int, Decimal, str) for value in values):
        raise TypeError("a value is neither a number nor a code")
    return list(values)


def _header_value(name: str, text: str) -> str:
    # A header that can't be sent would look like a lost connection, and be retried until the deadline.
    if re.fullmatch("[!-~]*", text) is None:
        raise ValueError(
            f"The {name} is not valid. Use visible ASCII characters, without spaces and line ends."
        )
    return text


def _retry_after(headers: httpx.Headers) -> Optional[float]:
    text = headers.get("Retry-After", "")
    if re.fullmatch("[0-9]+", text):
        return float(text)
    try:
        # A proxy may send a date.
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
