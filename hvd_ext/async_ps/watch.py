"""Notices at once when another rank's process ends.

MPI 3 does not say that a peer has died. So every rank keeps one otherwise silent TCP connection to
the primary server: the operating system closes it when a process ends, however it ends. A host that
vanishes without a word is noticed by TCP keep-alive, a process that hangs by the servers' time
limits. No thread and no MPI call is involved.
"""

from __future__ import annotations

import atexit
import contextlib
import secrets
import selectors
import socket
import time

LOCAL = "127.0.0.1"


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Host:
    """The primary server's end.

    Args:
        local: all ranks are on this host, so nobody else needs to be able to connect.
    """

    def __init__(self, *, local: bool) -> None:
        self.token = secrets.token_hex(8)
        self._listener = socket.create_server((LOCAL if local else "", 0), backlog=512)
        self._listener.settimeout(0.2)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, socket.socket] = {}
        atexit.register(self.close)

    def accept(self, ranks: set[int], seconds: float) -> set[int]:
        """Waits for the connections of ``ranks``; returns those that did not come in time."""
        deadline = time.monotonic() + seconds
        missing = set(ranks)
        while missing and time.monotonic() < deadline:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            try:
                connection.settimeout(2.0)
                message = connection.recv(64, socket.MSG_WAITALL).decode("ascii", "replace").split()
                if len(message) != 2 or not secrets.compare_digest(message[0], self.token):
                    raise ConnectionError("not one of ours")
                rank = int(message[1])
            except (OSError, ValueError):
                connection.close()
                continue
            connection.setblocking(False)
            _keep_alive(connection)
            self._connections[rank] = connection
            self._selector.register(connection, selectors.EVENT_READ, rank)
            missing.discard(rank)
        self._listener.close()
        return missing

    def lost(self) -> list[int]:
        """The ranks whose process has ended since the last call."""
        ended = []
        for key, _ in self._selector.select(timeout=0) if self._connections else []:
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                gone = connection.recv(64) == b""
            except BlockingIOError:
                gone = False
            except OSError:
                gone = True
            if gone:
                ended.append(int(key.data))
                self.forget(int(key.data))
        return ended

    def forget(self, rank: int) -> None:
        """Closes the connection of a rank; its process sees the end of it."""
        connection = self._connections.pop(rank, None)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()

    def close(self) -> None:
        """Closes everything."""
        for rank in list(self._connections):
            self.forget(rank)
        self._listener.close()
        self._selector.close()
        atexit.unregister(self.close)


class Guest:
    """Every other rank's end; ``connected`` is False where the primary could not be reached."""

    def __init__(self, rank: int, *, addresses: list[str], port: int, token: str,
                 seconds: float) -> None:
        self._connection: socket.socket | None = None
        for address in addresses:
            with contextlib.suppress(OSError):
                self._connection = socket.create_connection((address, port), timeout=seconds)
                self._connection.sendall(f"{token} {rank}".ljust(64).encode())
                self._connection.setblocking(False)
                _keep_alive(self._connection)
                break
        atexit.register(self.close)

    @property
    def connected(self) -> bool:
        """Whether the end of the primary's process would be noticed."""
        return self._connection is not None

    def lost(self) -> bool:
        """Whether the primary's process has ended, or has closed this connection."""
        if self._connection is None:
            return False
        try:
            return self._connection.recv(64) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Ends the connection: this rank is done, in good order or not."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        atexit.unregister(self.close)
