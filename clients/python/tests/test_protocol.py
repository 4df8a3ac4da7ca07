"""The decisions, without a server: when to retry, how long to wait, and what a response is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from decimal import Decimal
from email.utils import formatdate
from typing import Optional, cast

import httpx
import pytest

from tombola_client import UnexpectedResponse
from tombola_client._protocol import Attempt, Draw, Endpoint, Outcome, error_from
from tombola_client.errors import ClientError, ServerError, UnavailableError

JSON = {"Content-Type": "application/json"}
NUMBER = httpx.Response(200, json={"number": 5, "shard": "int_shard_0.db"})


class Play:
    """Plays outcomes to an operation on a clock of its own, and records the attempts."""

    def __init__(self, outcomes: Sequence[Outcome], jitter: float = 0.0, deadline: float = 60.0) -> None:
        self.now = 0.0
        self.outcomes = outcomes
        self.attempts: list[Attempt] = []
        self.endpoint = Endpoint(
            "http://h", None, 10.0, deadline, True, clock=lambda: self.now, jitter=lambda: jitter
        )

    def draw(self) -> Draw:
        steps = self.endpoint.draw("int")
        try:
            attempt = next(steps)
            for outcome in self.outcomes:
                self.attempts.append(attempt)
                self.now += attempt.wait
                attempt = steps.send(outcome)
        except StopIteration as done:
            return cast(Draw, done.value)
        raise AssertionError(f"another attempt: {attempt}")

    def waits(self) -> list[float]:
        return [attempt.wait for attempt in self.attempts]


def refused(status: int, retry_after: Optional[str] = None) -> httpx.Response:
    return httpx.Response(status, headers={} if retry_after is None else {"Retry-After": retry_after})


@pytest.mark.parametrize(
    "outcome",
    [
        *(refused(status) for status in (429, 502, 503, 504)),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout(""),
        httpx.RemoteProtocolError("incomplete"),
        httpx.DecodingError("incomplete"),
        # A proxy removed Content-Length, so only the JSON shows that a part is missing.
        httpx.Response(200, content=b'{"number":5,"sh', headers=JSON),
        httpx.Response(200, content=b"", headers=JSON),
    ],
)
def test_what_may_pass_is_retried_with_the_same_key(outcome: Outcome) -> None:
    play = Play([outcome, outcome, NUMBER])
    drawn = play.draw()
    assert drawn.values == [5]
    assert [attempt.headers["Idempotency-Key"] for attempt in play.attempts] == [drawn.key] * 3


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (refused(400, "1"), ClientError),
        (refused(410, "1"), ClientError),
        (refused(500, "1"), ServerError),
        (httpx.Response(302, headers={"Location": "/"}), UnexpectedResponse),
        (httpx.Response(200, html="<p>Log in</p>"), UnexpectedResponse),
        (httpx.Response(204), UnexpectedResponse),
        (httpx.Response(200, json=[]), UnexpectedResponse),
        (httpx.Response(200, json={"number": None}), UnexpectedResponse),
        (httpx.Response(200, json={"number": True}), UnexpectedResponse),
        (httpx.Response(200, json={"numbers": 5}), UnexpectedResponse),
        (httpx.Response(200, json={"numbers": [1, 2]}), UnexpectedResponse),
        (httpx.Response(200, content=b'{"number":NaN}', headers=JSON), UnexpectedResponse),
    ],
)
def test_what_stays_wrong_is_not_retried(outcome: Outcome, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        Play([outcome]).draw()


def test_a_wait_is_never_shorter_than_retry_after() -> None:
    for jitter in (0.0, 1.0):
        play = Play([refused(503, "7"), refused(429, "2"), NUMBER], jitter)
        play.draw()
        assert play.waits() == [0.0, 7 + 0.1 * jitter, 2 + 0.2 * jitter]


def test_waits_without_retry_after_double_up_to_a_limit() -> None:
    play = Play([httpx.ConnectError("")] * 9 + [NUMBER], 1.0)
    play.draw()
    assert play.waits() == pytest.approx([0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 6.4, 6.4])


def test_clients_that_are_cut_off_together_wait_for_different_times() -> None:
    waits = set()
    for _ in range(10):
        steps = Endpoint("http://h", None, 10.0, 60.0, True).draw("int")
        next(steps)
        waits.add(steps.send(httpx.ConnectError("")).wait)
    assert len(waits) == 10


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("12", 12),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("1.5", None),
        ("Mon, 01 Jan 2024 00:00:00 +99999999999999999999", None),
    ],
)
def test_retry_after_is_a_number_of_seconds(text: str, seconds: Optional[float]) -> None:
    assert error_from(refused(503, text)).retry_after == seconds


def test_retry_after_may_be_a_date() -> None:
    for ahead, least, most in ((30, 28, 30), (-30, 0, 0)):
        error = error_from(refused(503, formatdate(time.time() + ahead, usegmt=True)))
        assert error.retry_after is not None
        assert least <= error.retry_after <= most


def test_no_attempt_begins_after_the_deadline() -> None:
    play = Play([refused(503, "4")] * 3, deadline=10)
    with pytest.raises(UnavailableError) as caught:
        play.draw()
    # The attempts are at 0, 4 and 8 seconds. The last one may only take until the deadline.
    assert play.waits() == [0, 4, 4]
    assert [attempt.timeout for attempt in play.attempts] == [10, 6, 2]
    assert caught.value.attempts == 3


def test_numbers_and_codes_keep_their_text() -> None:
    for text, value in (
        (b"5.100000", Decimal("5.100000")),
        (b"-0.00000000000001", Decimal("-0.00000000000001")),
        (b"9007199254740991", 9007199254740991),
        (b'"000123"', "000123"),
    ):
        name = b"code" if text.startswith(b'"') else b"number"
        content = b'{"%s":%s,"shard":"s"}' % (name, text)
        (found,) = Play([httpx.Response(200, content=content, headers=JSON)]).draw().values
        assert (type(found), str(found)) == (type(value), str(value))
