"""Attacks on the services of drivers and tasks, which unpickle what carries an HMAC under the job's key."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.security.attacks import (
    DEADLINE_S,
    HOST,
    connect,
    edited_message,
    evil_base64,
    evil_pickle,
    flood,
    read_all,
    released_message,
    send,
    talk_to_edited_service,
    victim,
)
from tests.security.victims import SERVICES

KEY = bytes.fromhex("11" * 32)
OTHER = bytes.fromhex("22" * 32)
CLIENT = """
import sys
from horovod.runner.common.service.task_service import BasicTaskClient
addresses = {"lo": [("127.0.0.1", int(sys.argv[2]))]}
client = BasicTaskClient(sys.argv[1], addresses, bytes.fromhex(sys.argv[3]), 0)
"""
PING = CLIENT + "print('answers')"
RUN = CLIENT + "client.run_command('true', {})"


def names_of(service: str) -> str:
    """How a service calls itself."""
    return {"driver": "horovod driver service", "ray driver": "horovod driver service",
            "task": "horovod task service #0", "notification": "worker notification service",
            "compute": "Compute service", "spark driver": "driver service",
            "spark task": "task service #0"}[service]


def client(source: Path, code: str, service: str, port: int, key: bytes) -> subprocess.CompletedProcess[str]:
    """A client of the same Horovod."""
    return subprocess.run([sys.executable, "-c", code, names_of(service), str(port), key.hex()],
                          env={**os.environ, "PYTHONPATH": str(source)}, capture_output=True, text=True,
                          timeout=DEADLINE_S)


@pytest.mark.parametrize("service", SERVICES)
def test_pickles_for_each_service(sources: dict[str, Path], tmp_path: Path, service: str) -> None:
    """Without a key, under another job's and, to show that the pickle is one, under this job's."""
    mark = tmp_path / "mark"
    for kind in ("released", "edited"):
        with victim(sources[kind], service) as server:
            if kind == "released":
                send(server.port, released_message(OTHER, evil_pickle(mark)))
                assert not mark.exists()
                send(server.port, released_message(KEY, evil_pickle(mark)))
            else:
                for body in (evil_pickle(mark), evil_base64(mark)):
                    assert send(server.port, body)[16:] == b""
                    assert talk_to_edited_service(server.port, OTHER, body) == b""
                assert not mark.exists()
                assert "Horovod refused a request from 127.0.0.1" in server.log()
                assert "answers" in client(sources[kind], PING, service, server.port, KEY).stdout
                talk_to_edited_service(server.port, KEY, evil_pickle(mark))
        assert mark.exists()
        mark.unlink()


class Relay:
    """Passes connections on to a port and keeps what clients say."""

    def __init__(self, port: int) -> None:
        self.target, self.said = port, []
        self.listener = socket.create_server((HOST, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = connect(self.target)
                heard = bytearray()
                self.said.append(heard)
                threading.Thread(target=self._pass, args=(client, server, heard), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, bytearray()), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, heard: bytearray) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                heard += part
                target.sendall(part)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("kind", ["released", "edited"])
def test_a_recorded_command_is_sent_again(sources: dict[str, Path], kind: str) -> None:
    with victim(sources[kind], "task", VICTIM_KEY=KEY.hex()) as first, \
            victim(sources[kind], "task", VICTIM_KEY=KEY.hex()) as second:
        relay = Relay(first.port)
        assert client(sources[kind], RUN, "task", relay.port, KEY).returncode == 0
        recorded = bytes(relay.said[-1])
        if kind == "released":
            assert b"AckResponse" in send(second.port, recorded)
        else:
            assert send(second.port, recorded)[16:] == b""
            assert send(first.port, recorded)[16:] == b""
            assert "its message is not of this job" in second.log()


@pytest.mark.parametrize("kind", ["released", "edited"])
def test_a_shutdown_while_strangers_are_silent(sources: dict[str, Path], kind: str) -> None:
    with victim(sources[kind], "spark task", VICTIM_PATIENCE="1" if kind == "released" else "60") as server:
        threads = server.ask()
        silent = [connect(server.port), connect(server.port)]
        silent[0].sendall(b"\0" * 7)
        wait_until(lambda: server.ask() == threads + 2)
        assert server.ask("shutdown") == ("hangs" if kind == "released" else "ended")


def test_a_stranger_cannot_make_a_service_read(sources: dict[str, Path]) -> None:
    with victim(sources["edited"], "task") as server, connect(server.port) as connection:
        greeting = connection.recv(16, socket.MSG_WAITALL)
        message = edited_message(OTHER, greeting + bytes(16), b"x" * 1000)
        connection.sendall(bytes(16) + message[:40])  # the length, under another key
        assert read_all(connection) == b""


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, at most a minute."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.extended)])
def test_a_flood_of_silent_connections(sources: dict[str, Path], count: int) -> None:
    with victim(sources["edited"], "task", VICTIM_TIMEOUT="5") as server:
        silent = flood(server.port, count)
        assert "answers" in client(sources["edited"], PING, "task", server.port, KEY).stdout
        assert server.ask() < 600  # threads
        assert server.ask("shutdown") == "ended"
        for connection in silent:
            connection.close()
