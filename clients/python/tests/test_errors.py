"""Each error code of the server has its class. As many as possible are provoked on a real server."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any, Callable, Optional

import httpx
import pytest
from conftest import POOLS, Server

from tombola_client import ResponseError, TombolaError, errors
from tombola_client._protocol import error_from

Connect = Callable[..., Any]
Start = Callable[[str], Server]

TOKENS = {scope: f"tombola_{hashlib.sha256(scope.encode()).hexdigest()}" for scope in ("draw", "observe")}


def camel(code: str) -> str:
    return "".join(word.capitalize() for word in code.split("_"))


def expect(code: str) -> Any:
    return pytest.raises(getattr(errors, camel(code)), check=lambda error: error.code == code)


def test_each_code_of_the_description_has_its_class(shared: Server) -> None:
    description = httpx.get(f"{shared.url}/openapi.json").json()
    codes = description["components"]["schemas"]["Code"]["enum"]
    assert len(codes) > 20
    for code in codes:
        error = getattr(errors, camel(code))
        assert issubclass(error, ResponseError)
        assert errors.error_class(400, code) is error


def test_each_code_of_the_documentation_has_its_class_and_status() -> None:
    # The sdist does not contain the documentation of the server.
    page = Path(__file__).parents[3] / "docs" / "http.md"
    if not page.exists():
        pytest.skip("docs/http.md is only in the repository")
    rows = re.findall(r"^\| ([\d, ]+) \| (`\w+`(?:, `\w+`)*) \|", page.read_text("utf-8"), re.MULTILINE)
    documented = {}
    for statuses, codes in rows:
        each = statuses.split(", ")
        for index, code in enumerate(re.findall(r"\w+", codes)):
            documented[code] = int(each[min(index, len(each) - 1)])
    assert len(documented) > 30
    for code, status in documented.items():
        assert issubclass(errors.error_class(status, code), errors.error_class(status, None)), code
    assert set(errors._BY_CODE) == set(documented)


@pytest.mark.parametrize(
    ("code", "draw"),
    [
        ("unknown_type", {"pool": "no"}),
        ("bad_count", {"count": 0}),
        ("bad_count", {"count": 51}),
        ("bad_label", {"label": ""}),
        ("bad_key", {"key": "k" * 256}),
        ("bad_key", {"key": ""}),
    ],
)
def test_a_wrong_draw_is_refused(connect: Connect, shared: Server, code: str, draw: dict[str, Any]) -> None:
    client = connect(shared.url)
    with expect(code) as caught:
        client.draw_details(**draw)
    assert caught.value.attempts == 1
    assert not caught.value.may_retry
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("code", "path", "http_options"),
    [
        ("unknown_parameter", "", {"params": {"colour": "red"}}),
        ("cross_site", "", {"headers": {"Host": "other.example"}}),
        ("prefetch", "", {"headers": {"Sec-Purpose": "prefetch"}}),
        ("not_found", "/elsewhere", {}),
    ],
)
def test_a_wrong_environment_is_refused(
    connect: Connect, shared: Server, code: str, path: str, http_options: dict[str, Any]
) -> None:
    with expect(code):
        connect(shared.url + path, http_options=http_options).draw()


@pytest.mark.parametrize(
    ("code", "method", "path", "options"),
    [
        ("key_needs_post", "GET", "/random", {"headers": {"Idempotency-Key": "a"}}),
        ("bad_body", "POST", "/random", {"json": []}),
        ("not_json", "POST", "/random", {"content": b"{}"}),
        ("method_not_allowed", "DELETE", "/random", {}),
        ("body_too_large", "POST", "/random", {"json": {"label": "x" * 20_000}}),
        ("bad_number", "GET", "/receipts?limit=x", {}),
        (
            "bad_lines",
            "POST",
            "/pools/int/used",
            {"content": b"x", "headers": {"Content-Type": "text/plain"}},
        ),
        ("not_text", "POST", "/pools/int/used", {"json": []}),
    ],
)
def test_an_error_that_no_draw_provokes_has_its_class_too(
    shared: Server, code: str, method: str, path: str, options: dict[str, Any]
) -> None:
    response = httpx.request(method, shared.url + path, **options)
    with expect(code):
        raise error_from(response)


def test_a_used_key_is_refused_for_another_draw(connect: Connect, shared: Server) -> None:
    client = connect(shared.url)
    key = client.draw_details().key
    with expect("key_reused"):
        client.draw("float", key=key)


def test_a_pool_without_receipts_says_how_to_draw_from_it(connect: Connect, start: Start) -> None:
    server = start('pools.int.receipts = "off"')
    with expect("keys_off") as caught:
        connect(server.url).draw()
    assert "idempotent=False" in str(caught.value)
    client = connect(server.url, idempotent=False)
    assert type(client.draw()) is int
    assert len(set(client.draw_many(10))) == 10


def test_a_small_pool_is_exhausted(connect: Connect, start: Start) -> None:
    client = connect(start("[pools.tiny]\nmin = 1\nmax = 3\n").url)
    assert sorted(client.draw_many(3, "tiny")) == [1, 2, 3]
    with expect("exhausted"):
        client.draw("tiny")


def test_a_quota_refuses_large_draws_for_good_and_others_for_a_while(connect: Connect, start: Start) -> None:
    client = connect(start("quota.numbers_per_second = 0.01\nquota.burst = 5\n" + POOLS).url, deadline=5)
    with expect("above_burst"):
        client.draw_many(6)
    client.draw_many(5)
    with expect("over_quota") as caught:
        client.draw()
    assert caught.value.retry_after > 5


def test_tokens_are_required_and_have_scopes(connect: Connect, start: Start) -> None:
    tokens = "".join(
        f'[[auth.tokens]]\nname = "{scope}"\nscope = "{scope}"\n'
        f'sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'
        for scope, token in TOKENS.items()
    )
    url = start(tokens + POOLS).url
    assert type(connect(url, token=TOKENS["draw"]).draw()) is int
    with expect("unauthorized"):
        connect(url).draw()
    with expect("forbidden"):
        connect(url, token=TOKENS["observe"]).draw()
    with expect("forbidden"):
        connect(url, token=TOKENS["draw"]).receipt("int", 5)


def test_lookups_can_be_off(connect: Connect, start: Start) -> None:
    client = connect(start("receipts.lookups = false\n" + POOLS).url)
    with expect("lookups_off"):
        client.receipt("int", client.draw())


def test_a_pool_that_is_not_filled_yet_is_refilling(connect: Connect, start: Start) -> None:
    # More than a generation has, and more than the refiller makes in time for the first request.
    settings = "[pools.slow]\nmin = 0\nmax = 1_000_000_000\nshards = 1\nshard_size = 10\n"
    client = connect(start(settings).url, deadline=1)
    with expect("refilling") as caught:
        client.draw_details("slow", 10_000)
    assert caught.value.retry_after >= 1
    assert caught.value.may_retry


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"code": "new_code", "error": "New."}, errors.BadRequestError),
        (401, None, errors.AuthenticationError),
        (403, {"code": "new_code", "error": "New."}, errors.PermissionDeniedError),
        (418, {"code": "new_code", "error": "New."}, errors.ClientError),
        (431, None, errors.ClientError),
        (500, [], errors.ServerError),
        (502, None, errors.ServerError),
        (503, {"code": 1}, errors.UnavailableError),
    ],
)
def test_an_unknown_code_has_the_class_of_its_status(
    status: int, body: Optional[Any], kind: type[ResponseError]
) -> None:
    response = httpx.Response(status, json=body) if body is not None else httpx.Response(status)
    assert type(error_from(response)) is kind


def test_a_head_that_is_too_large_has_no_code(connect: Connect, shared: Server) -> None:
    client = connect(shared.url, http_options={"headers": {"X-Large": "x" * 20_000}})
    with pytest.raises(errors.ClientError) as caught:
        client.draw()
    assert (caught.value.status, caught.value.code) == (431, None)


def test_an_error_survives_pickling() -> None:
    for error in (errors.Refilling(503, "refilling", "Later.", 2.0), errors.NoResponse("lost")):
        error.key = "order-17"
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.key) == (type(error), str(error), "order-17")
        assert isinstance(copy, TombolaError)
