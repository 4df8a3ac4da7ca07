"""No number is lost and none comes twice, whatever happens to responses and to the server."""

from __future__ import annotations

import asyncio
import select
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest
from conftest import PATIENCE_SECONDS, POOLS, Fate, Proxy, Server, read_until

from tombola_client import AsyncClient, Client, NoResponse
from tombola_client.errors import BadCount, Exhausted, OverQuota

Connect = Callable[..., Any]
Start = Callable[[str], Server]
ProxyTo = Callable[..., Proxy]

# A kill burns at most twice lease.rows.
KILLED = f"server.count_limit = 50\nlease.rows = 16\n{POOLS}"


def lost(number: int) -> Fate:
    return 0 if number == 1 else None


def cut(number: int) -> Fate:
    # Without the last five bytes of the body.
    return -5 if number == 1 else None


class Killer:
    """Kills the server and starts it again at each 25th response, which is lost. Loses and cuts others."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.kills = 0

    def __call__(self, number: int) -> Fate:
        if number % 25 == 0:
            self.server.kill()
            self.server.start()
            self.kills += 1
            return 0
        if number % 10 == 0:
            return 0
        return -5 if number % 7 == 0 else None


@pytest.mark.parametrize("fate", [lost, cut])
def test_a_retry_gets_the_numbers_of_the_lost_response(
    connect: Connect, start: Start, proxy_to: ProxyTo, fate: Callable[[int], Fate]
) -> None:
    server = start(POOLS)
    values = []
    for pool in ("int", "float", "voucher"):
        proxy = proxy_to(server, fate)
        drawn = connect(proxy.url).draw_details(pool)
        assert drawn.replayed
        assert len(proxy.requests) == 2
        values += drawn.values
    assert server.issued() == values


def test_threads_lose_nothing_when_the_server_is_killed(start: Start, proxy_to: ProxyTo) -> None:
    server = start(KILLED)
    killer = Killer(server)
    proxy = proxy_to(server, killer)
    with Client(proxy.url) as client, ThreadPoolExecutor(4) as threads:
        draws = [threads.submit(client.draw) for _ in range(150)]
        values = [draw.result() for draw in draws]
    assert killer.kills >= 5
    assert len(set(values)) == 150
    # Each value that a response contained has reached its caller.
    assert sorted(server.issued()) == sorted(values)


def test_tasks_lose_nothing_when_the_server_is_killed(start: Start, proxy_to: ProxyTo) -> None:
    server = start(KILLED)
    killer = Killer(server)
    proxy = proxy_to(server, killer)

    async def draw() -> list[Any]:
        async with AsyncClient(proxy.url) as client:
            return list(await asyncio.gather(*(client.draw() for _ in range(150))))

    values = asyncio.run(draw())
    assert killer.kills >= 5
    assert len(set(values)) == 150
    assert sorted(server.issued()) == sorted(values)


def test_a_bulk_draw_loses_nothing_when_the_server_is_killed(
    connect: Connect, start: Start, proxy_to: ProxyTo
) -> None:
    server = start(KILLED)
    killer = Killer(server)
    proxy = proxy_to(server, killer)
    values = connect(proxy.url).draw_many(2000)
    assert killer.kills >= 1
    assert len(set(values)) == 2000
    # The receipts are in the order of their commits, which is the order of the parts.
    assert server.issued() == values


def test_retry_after_is_honoured(connect: Connect, start: Start, proxy_to: ProxyTo) -> None:
    server = start("quota.numbers_per_second = 1\nquota.burst = 1\n" + POOLS)
    proxy = proxy_to(server)
    client = connect(proxy.url)
    client.draw()
    begin = time.monotonic()
    client.draw()
    # 429 with `Retry-After: 1`, and then the number. A client that asks earlier is refused again.
    assert len(proxy.requests) == 3
    assert 1 <= time.monotonic() - begin < 10


def test_a_wait_beyond_the_deadline_ends_the_draw_at_once(connect: Connect, start: Start) -> None:
    server = start("quota.numbers_per_second = 0.01\nquota.burst = 1\n" + POOLS)
    client = connect(server.url, deadline=5)
    client.draw()
    begin = time.monotonic()
    with pytest.raises(OverQuota) as caught:
        client.draw(key="later")
    assert time.monotonic() - begin < 5
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 5
    assert (caught.value.key, caught.value.attempts, caught.value.may_retry) == ("later", 1, True)


def test_the_deadline_ends_a_draw_and_its_error_has_the_key(
    connect: Connect, start: Start, proxy_to: ProxyTo
) -> None:
    server = start(POOLS)
    proxy = proxy_to(server, lambda _: 0)
    client = connect(proxy.url, deadline=2)
    begin = time.monotonic()
    with pytest.raises(NoResponse) as caught:
        client.draw("voucher")
    assert time.monotonic() - begin < 10
    assert caught.value.attempts == len(proxy.requests) > 1
    # The number that was taken is not lost.
    proxy.decide = lambda _: None
    assert caught.value.key is not None
    assert caught.value.key in str(caught.value)
    assert [client.draw("voucher", key=caught.value.key)] == server.issued()


def test_a_server_that_stays_silent_is_left_after_the_timeout(
    connect: Connect, start: Start, proxy_to: ProxyTo
) -> None:
    def silent(number: int) -> Fate:
        # The first response is held back until the client has hung up and sent its second request.
        if number == 1:
            limit = time.monotonic() + 10
            while len(proxy.requests) < 2 and time.monotonic() < limit:
                time.sleep(0.01)
        return None

    server = start(POOLS)
    proxy = proxy_to(server, silent)
    value = connect(proxy.url, timeout=0.3).draw()
    assert len(proxy.requests) >= 2
    assert server.issued() == [value]


def test_the_error_of_a_bulk_draw_has_the_key_of_all_parts(
    connect: Connect, start: Start, proxy_to: ProxyTo
) -> None:
    server = start(POOLS)
    proxy = proxy_to(server, lambda number: None if number <= 2 else 0)
    client = connect(proxy.url, deadline=2)
    seen = []
    with pytest.raises(NoResponse) as caught:  # noqa: PT012
        for value in client.iter_many(40, part_size=10):
            seen.append(value)
    assert len(seen) == 20
    proxy.decide = lambda _: None
    values = client.draw_many(40, part_size=10, key=caught.value.key)
    assert values[:20] == seen
    assert server.issued() == values


LIMITED = f"server.count_limit = 50\n{POOLS}"
LOWERED = f"server.count_limit = 20\n{POOLS}"


def draw_while_the_limit_falls(client: Client, server: Server, seen: list[Any]) -> None:
    """Draws 120 values in parts of 50. The limit is lower from the second part on."""
    for value in client.iter_many(120, part_size=50):
        seen.append(value)
        if len(seen) == 50:
            server.reload(LOWERED)


def test_the_error_of_a_bulk_draw_has_its_key_if_the_limit_can_not_be_read(
    connect: Connect, start: Start, proxy_to: ProxyTo
) -> None:
    def without_description(_: int) -> Fate:
        return 0 if b" /openapi.json " in proxy.requests[-1] else None

    server = start(LIMITED)
    proxy = proxy_to(server, without_description)
    client = connect(proxy.url, deadline=2)
    seen: list[Any] = []
    with pytest.raises(NoResponse) as caught:
        draw_while_the_limit_falls(client, server, seen)
    assert len(seen) == 50
    server.reload(LIMITED)
    values = client.draw_many(120, part_size=50, key=caught.value.key)
    assert values[:50] == seen
    assert server.issued() == values


def test_the_error_of_a_bulk_draw_has_its_key_if_the_limit_explains_nothing(
    connect: Connect, start: Start, proxy_to: ProxyTo
) -> None:
    def raise_again(number: int) -> Fate:
        # The second part was refused. Until the client asks for the limit, it is what it was.
        if number == 2:
            server.reload(LIMITED)
        return None

    server = start(LIMITED)
    client = connect(proxy_to(server, raise_again).url)
    seen: list[Any] = []
    with pytest.raises(BadCount) as caught:
        draw_while_the_limit_falls(client, server, seen)
    assert len(seen) == 50
    values = client.draw_many(120, part_size=50, key=caught.value.key)
    assert values[:50] == seen
    assert server.issued() == values


def test_a_bulk_draw_from_a_pool_that_is_used_up_first_keeps_its_parts(
    connect: Connect, start: Start
) -> None:
    server = start("[pools.tiny]\nmin = 1\nmax = 25\n")
    client = connect(server.url)
    with pytest.raises(Exhausted) as caught:
        client.draw_many(30, "tiny", part_size=10)
    drawn = []
    with pytest.raises(Exhausted):  # noqa: PT012
        for value in client.iter_many(30, "tiny", part_size=10, key=caught.value.key):
            drawn.append(value)
    assert len(drawn) == 20
    assert server.issued() == drawn


def test_without_keys_a_lost_response_is_retried_too(
    connect: Connect, start: Start, proxy_to: ProxyTo
) -> None:
    server = start('pools.int.receipts = "all"')
    proxy = proxy_to(server, lost)
    value = connect(proxy.url, idempotent=False).draw()
    assert proxy.keys() == [None, None]
    assert server.issued()[1:] == [value]


FORK = """
import os, sys
from tombola_client import Client

client = Client(sys.argv[1], deadline=5)
client.draw()
if os.fork() != 0:
    os.wait()
else:
    client.draw()
"""


def test_a_forked_process_does_not_use_the_connections_of_its_parent() -> None:
    response = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 23\r\n\r\n"
        b'{"number":5,"shard":""}'
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with subprocess.Popen([sys.executable, "-c", FORK, url]), listener.accept()[0] as of_parent:
            assert read_until(of_parent, b"\r\n\r\n")
            of_parent.sendall(response)
            # The child draws while the connection of its parent is open.
            ready, _, _ = select.select([of_parent, listener], [], [], PATIENCE_SECONDS)
            assert ready == [listener]
            with listener.accept()[0] as of_child:
                assert read_until(of_child, b"\r\n\r\n")
                of_child.sendall(response)
