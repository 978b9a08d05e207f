"""Accepts connections that send a fixed-length token within a time limit; closes all others.

All callers are heard at the same time, so that strangers who stay silent hold nobody up.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time

MAX_PENDING_CONNECTIONS = 256  # at a time; of more, those that came first are closed


class TokenAcceptor:
    """Collects what callers say first.

    Args:
        listener: listens already; closing it ends the doorway.
        length: how many bytes a caller is to say.
        seconds: how long it may take.
    """

    def __init__(self, listener: socket.socket, *, length: int, seconds: float) -> None:
        listener.setblocking(False)
        self._listener, self._length, self._seconds = listener, length, seconds
        self._callers: dict[socket.socket, tuple[float, bytes]] = {}  # until when, and what each has said
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    @property
    def open(self) -> bool:
        """Whether the listener is not closed yet."""
        return self._listener.fileno() >= 0

    def poll(self, seconds: float) -> list[tuple[socket.socket, bytes]]:
        """Callers who have said all of it, within ``seconds``; whoever calls this closes them."""
        done = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                with contextlib.suppress(OSError):  # closed meanwhile, or the caller has gone
                    caller, _ = self._listener.accept()
                    caller.setblocking(False)
                    self._callers[caller] = time.monotonic() + self._seconds, b""
                    self._selector.register(caller, selectors.EVENT_READ)
            elif isinstance(key.fileobj, socket.socket):
                said = self._read_token(key.fileobj)
                if said is not None:
                    done.append((key.fileobj, said))
        now = time.monotonic()
        late = [caller for caller, (until, _) in self._callers.items() if until < now]
        for caller in {*late, *list(self._callers)[:-MAX_PENDING_CONNECTIONS]}:
            self._let_go(caller)
            caller.close()
        return done

    def _read_token(self, caller: socket.socket) -> bytes | None:
        """What a caller has said, once it is all of it."""
        until, said = self._callers[caller]
        try:
            part = caller.recv(self._length - len(said))
        except BlockingIOError:
            return None
        except OSError:
            part = b""
        said += part
        if part and len(said) < self._length:
            self._callers[caller] = until, said
            return None
        self._let_go(caller)
        if not part:
            caller.close()
            return None
        return said

    def _let_go(self, caller: socket.socket) -> None:
        del self._callers[caller]
        self._selector.unregister(caller)

    def close(self) -> None:
        """Close the listener and all who have not said enough."""
        self._listener.close()
        for caller in list(self._callers):
            self._let_go(caller)
            caller.close()
        self._selector.close()
