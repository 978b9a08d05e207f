"""Notices at once when another rank's process ends.

MPI 3 does not say that a peer has died. So every rank keeps one otherwise silent TCP connection to
the primary server: the operating system closes it when a process ends, however it ends. A host that
vanishes without a word is noticed by TCP keep-alive, a process that hangs by the servers' time
limits. No thread and no MPI call is involved.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import selectors
import socket
import time
import weakref

from hvd_ext.watchdog.token_acceptor import TokenAcceptor

LOCAL = "127.0.0.1"
GREETING = 64  # bytes that a rank says first: the token and its number


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


_ENDS: weakref.WeakSet[LivenessServer | LivenessClient] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child, such as a loader's worker, must not keep its parent's connections open."""
    for end in list(_ENDS):
        atexit.unregister(end.close)
        end.close_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class LivenessServer:
    """The primary server's end.

    Args:
        local: all ranks are on this host, so nobody else needs to be able to connect.
    """

    def __init__(self, *, local: bool) -> None:
        self.token = secrets.token_hex(8)
        listener = socket.create_server((LOCAL if local else "", 0), backlog=512)
        self.port: int = listener.getsockname()[1]
        self._door = TokenAcceptor(listener, length=GREETING, seconds=2.0)
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, socket.socket] = {}
        atexit.register(self.close)
        _ENDS.add(self)

    def accept_ranks(self, ranks: set[int], seconds: float) -> set[int]:
        """Waits for the connections of ``ranks``; returns those that did not come in time."""
        deadline = time.monotonic() + seconds
        missing = set(ranks)
        while missing and time.monotonic() < deadline:
            for connection, said in self._door.poll(0.2):
                message = said.decode("ascii", "replace").split()
                rank = message[1] if len(message) == 2 and secrets.compare_digest(
                    message[0].encode(), self.token.encode()) else ""
                if not rank.isdecimal() or int(rank) not in missing:
                    connection.close()
                    continue
                _keep_alive(connection)
                self._connections[int(rank)] = connection
                self._selector.register(connection, selectors.EVENT_READ, int(rank))
                missing.discard(int(rank))
        self._door.close()
        return missing

    def dead_ranks(self) -> list[int]:
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
                self.forget_rank(int(key.data))
        return ended

    def forget_rank(self, rank: int) -> None:
        """Closes the connection of a rank; its process sees the end of it."""
        connection = self._connections.pop(rank, None)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()

    def close(self) -> None:
        """Closes everything."""
        for rank in list(self._connections):
            self.forget_rank(rank)
        self._door.close()
        self._selector.close()
        atexit.unregister(self.close)

    def close_in_child(self) -> None:
        """Closes this process's copies. The selector is shared with the parent, which goes on using it."""
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            connection.close()


class LivenessClient:
    """Every other rank's end; ``connected`` is False where the primary could not be reached."""

    def __init__(self, rank: int, *, addresses: list[str], port: int, token: str,
                 seconds: float) -> None:
        self._connection: socket.socket | None = None
        for address in addresses:
            with contextlib.suppress(OSError):
                self._connection = socket.create_connection((address, port), timeout=seconds)
                self._connection.sendall(f"{token} {rank}".ljust(GREETING).encode())
                self._connection.setblocking(False)
                _keep_alive(self._connection)
                break
        atexit.register(self.close)
        _ENDS.add(self)

    @property
    def connected(self) -> bool:
        """Whether the end of the primary's process would be noticed."""
        return self._connection is not None

    def primary_lost(self) -> bool:
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

    def close_in_child(self) -> None:
        """Closes this process's copy."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
