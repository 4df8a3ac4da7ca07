"""A real server, and a proxy that loses responses on purpose. Both use free ports of 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Callable, Optional

import httpx
import pytest

from tombola_client import AsyncClient, Client, Value

BINARY = os.environ.get("TOMBOLA", "")

# No test takes longer.
PATIENCE_SECONDS = 60

POOLS = """
[pools.int]
shards = 1
shard_size = 20_000
[pools.float]
shards = 1
shard_size = 1_000
[pools.voucher]
pattern = "####-####-##?"
alphabet = "crockford32"
check = "iso7064"
shards = 1
shard_size = 1_000
"""


class Server:
    """A tombola server in a folder of its own, which can be killed and started again."""

    def __init__(self, folder: Path, settings: str) -> None:
        self.folder = folder
        self.configure(settings)
        self.start()

    def configure(self, settings: str) -> None:
        # Settings without a table come first.
        (self.folder / "config.toml").write_text(
            f'server.listen = "127.0.0.1:0"\nstorage.dir = "data"\n{settings}\n', "utf-8"
        )

    def reload(self, settings: str) -> None:
        """Changes the settings of the server while it runs."""
        self.configure(settings)
        httpx.post(f"{self.url}/reload").raise_for_status()

    def start(self) -> None:
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [BINARY, "--config", "config.toml"],
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        # Ends the server, and with it the wait for its first line, if it does not start.
        watchdog = threading.Timer(PATIENCE_SECONDS, self.process.kill)
        watchdog.start()
        first = self.process.stdout.readline()
        watchdog.cancel()
        assert first.startswith("Listening on "), (self.folder / "log").read_text("utf-8")
        self.url = first.removeprefix("Listening on ").strip()

    def wait_until_ready(self) -> None:
        """Waits until each pool has numbers, so that no draw gets 503 `refilling`."""
        end = time.monotonic() + PATIENCE_SECONDS
        while httpx.get(f"{self.url}/ready").status_code != 200:
            assert time.monotonic() < end, "the server does not become ready"
            time.sleep(0.01)

    def kill(self) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)
        self.process.stdout.close()

    def receipts(self) -> list[dict[str, Any]]:
        lines = httpx.get(f"{self.url}/receipts").text.splitlines()
        return [json.loads(line, parse_float=Decimal) for line in lines]

    def issued(self) -> list[Any]:
        """Returns all values that are in a receipt, which is to say in a response that was kept."""
        return [value for line in self.receipts() for value in line.get("numbers") or line["codes"]]


# The end of the slice of a response that a proxy passes on before it closes: all of it if None.
Fate = Optional[int]


class Proxy:
    """Passes on one request for each connection, and lets `decide` choose how much of the response arrives.

    `decide` gets the number of the response, from 1, before any byte of it is passed on.
    """

    def __init__(self, server: Server, decide: Callable[[int], Fate] = lambda _: None) -> None:
        self.server = server
        self.decide = decide
        self.requests: list[bytes] = []
        self._responses = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def keys(self) -> list[Optional[str]]:
        """Returns the key of each request that arrived."""
        found = []
        for request in self.requests:
            lines = request.decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
            found.append(headers.get("idempotency-key"))
        return found

    def close(self) -> None:
        # Wakes the thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(PATIENCE_SECONDS)
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(PATIENCE_SECONDS)
            request = read_until(client, b"\r\n\r\n")
            if not request:
                return
            self.requests.append(request)
            response = self._forward(request)
            if not response:
                return
            with self._lock:
                self._responses += 1
                fate = self.decide(self._responses)
            client.sendall(response[:fate])

    def _forward(self, request: bytes) -> bytes:
        # With `Connection: close`, the response ends where the connection ends.
        request = request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1).replace(
            b"Connection: keep-alive\r\n", b""
        )
        host, port = self.server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), PATIENCE_SECONDS) as upstream:
            upstream.sendall(request)
            response = b""
            while chunk := upstream.recv(65536):
                response += chunk
            return response


def read_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        chunk = connection.recv(65536)
        if not chunk:
            return b""
        received += chunk
    return received


@pytest.fixture(autouse=True)
def _limit() -> Iterator[None]:
    """Ends a test that hangs with an error, so that its servers are still stopped."""

    def end(*_: object) -> None:
        raise TimeoutError(f"the test took more than {PATIENCE_SECONDS} s")

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture(autouse=True)
def _no_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """Starts servers with the given settings, and stops them after the test."""
    servers: list[Server] = []

    def start_one(settings: str) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, settings))
        servers[-1].wait_until_ready()
        return servers[-1]

    yield start_one
    for server in servers:
        server.kill()
        shutil.rmtree(server.folder)


@pytest.fixture
def proxy_to() -> Iterator[Callable[..., Proxy]]:
    """Starts proxies, and closes them after the test."""
    proxies: list[Proxy] = []

    def start_one(server: Server, decide: Callable[[int], Fate] = lambda _: None) -> Proxy:
        proxies.append(Proxy(server, decide))
        return proxies[-1]

    yield start_one
    for proxy in proxies:
        proxy.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for tests that do not disturb each other."""
    server = Server(tmp_path_factory.mktemp("shared"), "server.count_limit = 50\n" + POOLS)
    server.wait_until_ready()
    yield server
    server.kill()


class Blocking:
    """Runs an `AsyncClient` in an event loop of its own, so that a test of `Client` tests it too."""

    def __init__(self, client: AsyncClient, http: httpx.AsyncClient) -> None:
        self._client = client
        self._http = http
        self._loop = asyncio.new_event_loop()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **options: self._loop.run_until_complete(method(*args, **options))

    def __repr__(self) -> str:
        return repr(self._client)

    def iter_many(self, *args: Any, **options: Any) -> Iterator[Value]:
        values = self._client.iter_many(*args, **options)

        async def take() -> Optional[Value]:
            async for value in values:
                return value
            return None

        while (value := self._loop.run_until_complete(take())) is not None:
            yield value

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.run_until_complete(self._http.aclose())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes clients of both kinds, and closes them after the test. `http_options` are those of `httpx`."""
    with contextlib.ExitStack() as stack:

        def connect_one(url: str, http_options: Optional[dict[str, Any]] = None, **options: Any) -> Any:
            if request.param == "sync":
                http = stack.enter_context(httpx.Client(**(http_options or {})))
                return stack.enter_context(Client(url, http=http, **options))
            async_http = httpx.AsyncClient(**(http_options or {}))
            client = Blocking(AsyncClient(url, http=async_http, **options), async_http)
            stack.callback(client.close)
            return client

        yield connect_one
