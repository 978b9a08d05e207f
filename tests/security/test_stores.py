"""Attacks on the HTTP servers: rendezvous, elastic driver, functions and results of ``horovod.run``."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.security.attacks import (
    DEADLINE_S,
    HOST,
    Victim,
    connect,
    evil_base64,
    flood,
    http,
    read_all,
    victim,
)

BOTH = pytest.mark.parametrize("kind", ["released", "edited"])


def run_task(source: Path, port: int, **variables: str) -> subprocess.CompletedProcess[str]:
    """A worker of ``horovod.run``: it fetches the function, runs it and sends the result."""
    return subprocess.run([sys.executable, "-m", "horovod.runner.run_task", HOST, str(port)],
                          env={**os.environ, "PYTHONPATH": str(source), **variables},
                          capture_output=True, text=True, timeout=DEADLINE_S)


def key_of(server: Victim) -> dict[str, str]:
    """The job's key, as a worker has it in its environment."""
    return {"_HOROVOD_SECRET_KEY": server.key.hex()} if server.key else {}


@BOTH
def test_a_pickle_as_addresses_of_an_elastic_worker(sources: dict[str, Path], tmp_path: Path,
                                                    kind: str) -> None:
    mark = tmp_path / "mark"
    with victim(sources[kind], "elastic") as driver:
        with contextlib.suppress(IndexError):  # the released server ends the connection without an answer
            status, _ = http(driver.port, "PUT", "/worker_addresses/node:0", evil_base64(mark))
            assert status == 403
        assert driver.ask()["workers"] == []
        assert mark.exists() is (kind == "released")  # CVE-2024-10190
        if kind == "edited":
            assert "Horovod refused a request from 127.0.0.1" in driver.log()


@BOTH
def test_a_pickle_as_the_function_of_a_worker(sources: dict[str, Path], tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    with victim(sources[kind], "function store") as store:
        status, _ = http(store.port, "PUT", "/runfunc/func", evil_base64(mark))
        done = run_task(sources[kind], store.port, **key_of(store))
        assert mark.exists() is (kind == "released")  # CVE-2026-31234
        assert status == (200 if kind == "released" else 403)
        if kind == "edited":
            assert done.returncode == 0, done.stderr
            assert store.ask("0").isdigit()  # what the job's own function returned


@BOTH
def test_a_pickle_as_the_result_of_a_rank(sources: dict[str, Path], tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    with victim(sources[kind], "function store") as store:
        http(store.port, "PUT", "/runfunc_result/0", evil_base64(mark))
        store.ask("0")
        assert mark.exists() is (kind == "released")


@BOTH
def test_a_false_store_sends_a_pickle_to_a_worker(sources: dict[str, Path], tmp_path: Path,
                                                  kind: str) -> None:
    mark = tmp_path / "mark"
    with serve(evil_base64(mark)) as port:
        done = run_task(sources[kind], port, _HOROVOD_SECRET_KEY="22" * 32)
    assert done.returncode
    assert mark.exists() is (kind == "released")
    if kind == "edited":
        assert f"{HOST}:{port} failed: its signature is missing" in done.stderr


@contextlib.contextmanager
def serve(body: bytes) -> Iterator[int]:
    """A server that answers every GET with ``body``, for the length of a ``with`` block; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer((HOST, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@BOTH
def test_a_stranger_disturbs_a_rendezvous(sources: dict[str, Path], kind: str) -> None:
    with victim(sources[kind], "rendezvous") as server:
        assert server.ask() == {"global": {"0": "address of rank 0"}}
        read = http(server.port, "GET", "/global/0")
        put = http(server.port, "PUT", "/global/0", b"my address")
        for rank in range(2):
            http(server.port, "DELETE", f"/global/{rank}")
        if kind == "released":
            assert (read, put[0]) == ((200, b"address of rank 0"), 200)
            assert server.ask() == {"global": {}}
        else:
            assert (read[0], put[0]) == (403, 403)
            assert server.ask() == {"global": {"0": "address of rank 0"}}


@BOTH
def test_a_stranger_says_that_a_rank_is_ready(sources: dict[str, Path], kind: str) -> None:
    with victim(sources[kind], "elastic") as driver:
        http(driver.port, "GET", "/rank_and_size/node:0")
        assert driver.ask()["ready"] == (["node:0"] if kind == "released" else [])


@BOTH
def test_files_of_the_working_directory(sources: dict[str, Path], kind: str) -> None:
    with victim(sources[kind], "rendezvous") as server:
        status, _ = http(server.port, "HEAD", "/README.md")
    assert status == (200 if kind == "released" else 501)


SIGN = """
from horovod.runner.common.util import secret, signed
import sys
key, method, path, body = bytes.fromhex(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4].encode()
print(signed.sign_request(key, method, path, body)[0], secret.rendezvous_token(key))
"""


def sign(source: Path, key: bytes, method: str, path: str, body: str = "") -> tuple[str, str]:
    """The header of a request and the token, under a key."""
    done = subprocess.run([sys.executable, "-c", SIGN, key.hex(), method, path, body], capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(source)}, text=True, timeout=DEADLINE_S,
                          check=True)
    signature, _, token = done.stdout.strip().rpartition(" ")
    return f"X-Horovod-Signature: {signature}\r\n", token


def test_recorded_changed_and_foreign_requests(sources: dict[str, Path]) -> None:
    addresses = '{"lo": [["127.0.0.1", 1234]]}'
    path = "/worker_addresses/node:0"
    with victim(sources["edited"], "elastic") as driver:
        own, _ = sign(sources["edited"], driver.key, "PUT", path, addresses)
        foreign, _ = sign(sources["edited"], bytes(32), "PUT", path, addresses)
        body = addresses.encode()
        assert http(driver.port, "PUT", path, body, foreign)[0] == 403  # recorded in another job
        assert http(driver.port, "PUT", path.replace("0", "1"), body, own)[0] == 403
        assert http(driver.port, "GET", path, b"", own)[0] == 403
        assert http(driver.port, "PUT", path, body + b" ", own)[0] == 403
        assert driver.ask()["workers"] == []
        assert http(driver.port, "PUT", path, body, own)[0] == 200
        assert http(driver.port, "PUT", path, body, own)[0] == 403  # once more
        assert driver.ask()["workers"] == [["node", 0, {"lo": [["127.0.0.1", 1234]]}]]


def test_a_signed_pickle_is_no_address(sources: dict[str, Path], tmp_path: Path) -> None:
    path = "/worker_addresses/node:0"
    body = evil_base64(tmp_path / "mark").decode()
    with victim(sources["edited"], "elastic") as driver:
        header, _ = sign(sources["edited"], driver.key, "PUT", path, body)
        assert http(driver.port, "PUT", path, body.encode(), header)[0] == 400
    assert not (tmp_path / "mark").exists()


def test_a_token_opens_only_what_gloo_needs(sources: dict[str, Path]) -> None:
    with victim(sources["edited"], "elastic") as driver:
        _, token = sign(sources["edited"], driver.key, "GET", "/")
        scopes = ("global", "local_node", "cross_0", "global_process_set_hash_1f", "worker_addresses",
                  "runfunc", "global_", "")
        statuses = [http(driver.port, "PUT", f"/{token}/{scope}/0", b"x")[0] for scope in scopes]
        assert statuses == [200] * 4 + [403] * 4
        assert http(driver.port, "PUT", f"/{token}/rank_and_size/node:0", b"x")[0] == 403
        assert http(driver.port, "GET", f"/{token}/rank_and_size/node:0") == (200, b"0,2,0,2,0,1")
        assert http(driver.port, "GET", f"/{token[::-1]}/global/0")[0] == 403
        assert driver.ask()["ready"] == ["node:0"]


def test_the_function_of_a_job_stays_as_it_is(sources: dict[str, Path]) -> None:
    with victim(sources["edited"], "function store") as store:
        header, _ = sign(sources["edited"], store.key, "PUT", "/runfunc/func", "other")
        assert http(store.port, "PUT", "/runfunc/func", b"other", header)[0] == 409


GARBAGE = (b"\0" * 4096, b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
           b"PUT /a/b HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n",
           b"GET /a/b HTTP/1.1\r\nX-Horovod-Signature: \xff\r\n\r\n",
           b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 90, b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 200_000)


def test_garbage_ends_its_connection_and_nothing_else(sources: dict[str, Path]) -> None:
    with victim(sources["edited"], "function store", VICTIM_TIMEOUT="1") as store:
        for garbage in GARBAGE:
            with connect(store.port) as connection, contextlib.suppress(ConnectionError):
                connection.sendall(garbage)
                read_all(connection)  # ends: the server does not wait for more than its limit
        done = run_task(sources["edited"], store.port, **key_of(store))
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.extended)])
def test_silent_strangers_keep_no_worker_from_its_function(sources: dict[str, Path], count: int) -> None:
    with victim(sources["edited"], "function store", VICTIM_TIMEOUT="5") as store:
        silent = flood(store.port, count)
        done = run_task(sources["edited"], store.port, **key_of(store))
        assert done.returncode == 0, done.stderr
        for connection in silent:
            connection.close()
