"""What the draws return, against a real server."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from decimal import Decimal
from typing import Any, Callable

import httpx
import pytest
from conftest import POOLS, Blocking, Proxy, Server

from tombola_client import AsyncClient, Client
from tombola_client.errors import KeyReused, NoReceipt

Connect = Callable[..., Any]
Start = Callable[[str], Server]


def test_each_pool_has_its_type(connect: Connect, shared: Server) -> None:
    client = connect(shared.url)
    assert type(client.draw()) is int
    assert type(client.draw("float")) is Decimal
    assert re.fullmatch(r"\w{4}-\w{4}-\w{3}", client.draw("voucher"))
    assert {type(value) for value in client.draw_many(3, "voucher")} == {str}


def test_a_decimal_has_exactly_the_text_that_was_sent(connect: Connect, start: Start) -> None:
    # The range has one value with zeros at the end, and values that str() writes with an exponent.
    server = start(
        "pools.int.enabled = false\npools.float.enabled = false\n"
        "[pools.zeros]\nmin = 5.1\nmax = 5.1\ndecimals = 6\n"
        "[pools.small]\nmin = -0.00000000000009\nmax = 0.00000000000009\ndecimals = 14\n"
    )
    client = connect(server.url)
    assert str(client.draw("zeros")) == "5.100000"
    drawn = client.draw_details("small", 19, key="all")
    text = httpx.post(
        f"{server.url}/random?type=small&count=19", headers={"Idempotency-Key": "all", "Accept": "text/csv"}
    ).text
    assert [format(value, "f") for value in drawn.values] == text.split()
    assert client.receipt("small", drawn.values[0]).values == drawn.values


def test_details_have_the_shards_and_the_key(connect: Connect, shared: Server) -> None:
    client = connect(shared.url)
    first = client.draw_details("voucher", 5)
    assert first.shards == {"voucher_shard_0.db": 5}
    assert not first.replayed
    again = client.draw_details("voucher", 5, key=first.key)
    assert again.values == first.values
    assert again.replayed
    assert client.draw_details("voucher").shards == {"voucher_shard_0.db": 1}


def test_each_draw_has_a_new_key(connect: Connect, shared: Server, proxy_to: Callable[..., Proxy]) -> None:
    proxy = proxy_to(shared)
    client = connect(proxy.url)
    for _ in range(3):
        client.draw()
    client.draw(key="order-17")
    keys = proxy.keys()
    assert len({key for key in keys if key}) == 4
    assert keys[3] == "order-17"


def test_a_large_draw_is_split_at_the_limit_of_the_server(
    connect: Connect, shared: Server, proxy_to: Callable[..., Proxy]
) -> None:
    proxy = proxy_to(shared)
    client = connect(proxy.url)
    key = client.draw_details().key
    values = client.draw_many(120, key=key, label="split")
    assert len(set(values)) == 120
    # After the draw that made the key, a part is above the limit, and the client asks for the limit.
    assert proxy.keys() == [key, f"{key}/1", None, f"{key}/1", f"{key}/2", f"{key}/3"]
    split = [line for line in shared.receipts() if line["label"] == "split" and line["numbers"][0] in values]
    assert [line["count"] for line in split] == [50, 50, 20]
    assert client.draw_many(120, key=key, label="split") == values
    with pytest.raises(KeyReused):
        client.draw_many(120, key=key, label="split", part_size=40)


def test_an_iterator_draws_a_part_when_it_is_needed(
    connect: Connect, shared: Server, proxy_to: Callable[..., Proxy]
) -> None:
    proxy = proxy_to(shared)
    values = connect(proxy.url).iter_many(30, part_size=10)
    assert len(proxy.requests) == 0
    seen = [next(values) for _ in range(10)]
    assert len(proxy.requests) == 1
    seen.extend(values)
    assert len(set(seen)) == 30
    assert len(proxy.requests) == 3


@pytest.mark.parametrize(("count", "part_size"), [(0, 10), (-1, 10), (1, 0)])
def test_a_bulk_draw_of_nothing_is_refused(
    connect: Connect, shared: Server, count: int, part_size: int
) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        connect(shared.url).draw_many(count, part_size=part_size)


@pytest.mark.parametrize("length", [0, 253])
def test_a_key_that_a_part_can_not_have_is_refused_before_the_first_part(
    connect: Connect, start: Start, length: int
) -> None:
    server = start(POOLS)
    client = connect(server.url)
    # Without a refusal, all callers without a key would share the key /1, or KEY/10 would be too long.
    with pytest.raises(ValueError, match="1 to 251 characters"):
        client.draw_many(100, part_size=10, key="k" * length)
    assert server.issued() == []
    # If the server's limit were 1, the last part would have the key KEY/100, with 255 characters.
    assert len(client.draw_many(100, part_size=10, key="k" * 251)) == 100


def test_a_receipt_tells_for_whom_a_code_was_drawn(connect: Connect, start: Start) -> None:
    # With symbols that a path must not contain unescaped.
    server = start('[pools.odd]\npattern = "#/##"\nalphabet = "abc%?/ "\n')
    client = connect(server.url)
    code = client.draw("odd", label="order-17")
    receipt = client.receipt("odd", code)
    assert (receipt.pool, receipt.label, receipt.values) == ("odd", "order-17", [code])
    assert receipt.at.utcoffset() is not None
    with pytest.raises(NoReceipt):
        client.receipt("odd", "no")


def test_the_simpler_modes_have_no_shards_and_no_keys(connect: Connect, start: Start) -> None:
    client = connect(start('server.mode = "sqlite"').url, idempotent=False)
    drawn = client.draw_details("float")
    assert drawn.shards == {}
    assert drawn.key is None
    assert type(drawn.values[0]) is Decimal


def test_a_client_closes_only_the_connections_that_it_opened(shared: Server) -> None:
    with httpx.Client() as http:
        with Client(shared.url, http=http) as client:
            client.draw()
        assert not http.is_closed
    with Client(shared.url) as client:
        client.draw()
    assert client._http.is_closed


def test_an_async_client_closes_only_the_connections_that_it_opened(shared: Server) -> None:
    async def use() -> None:
        async with httpx.AsyncClient() as http:
            async with AsyncClient(shared.url, http=http) as client:
                await client.draw()
            assert not http.is_closed
        async with AsyncClient(shared.url) as client:
            await client.draw()
        assert client._http.is_closed

    asyncio.run(use())


def test_the_token_is_sent_and_never_shown(
    connect: Connect, start: Start, proxy_to: Callable[..., Proxy]
) -> None:
    token = "tombola_" + "5" * 64
    proxy = proxy_to(start(POOLS))
    client = connect(proxy.url, token=token, http_options={"headers": {"X-Tenant": "a"}})
    client.draw()
    (request,) = proxy.requests
    assert f"Authorization: Bearer {token}\r\n".lower().encode() in request.lower()
    assert b"user-agent: tombola-client/" in request.lower()
    assert b"x-tenant: a" in request.lower()
    inner = client._client if isinstance(client, Blocking) else client
    shown = [repr(client), str(client), str(vars(inner)), str(vars(inner._endpoint))]
    assert not any(token in text for text in shown), shown
    assert proxy.url in repr(client)


@pytest.mark.parametrize("token", ["tombola_1\n", "tombola 1", "tombola_ä"])
def test_a_token_that_no_header_can_contain_is_refused(connect: Connect, token: str) -> None:
    with pytest.raises(ValueError, match="token") as caught:
        connect("http://127.0.0.1:1", token=token)
    assert token not in str(caught.value)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://h", "http://", "http://u:p@h", "http://h/?a=b"])
def test_a_wrong_base_url_is_refused(connect: Connect, url: str) -> None:
    with pytest.raises(ValueError, match="base URL"):
        connect(url)


def test_values_are_unique_across_pools_of_threads_and_tasks(shared: Server) -> None:
    async def draw() -> list[Any]:
        async with AsyncClient(shared.url) as client:
            return list(await asyncio.gather(*(client.draw() for _ in range(50))))

    assert max(Counter(asyncio.run(draw())).values()) == 1
