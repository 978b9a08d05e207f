"""What can end a run: each error says what happened and what to do."""


class ServerLost(RuntimeError):
    """A server died or does not answer; the last checkpoint is the way back."""


class ServerStopped(RuntimeError):
    """The server was stopped on purpose (Ctrl-C, a signal, an error in its schedule)."""


class LeftOut(RuntimeError):
    """This worker was silent for longer than the server waits and no longer takes part."""
