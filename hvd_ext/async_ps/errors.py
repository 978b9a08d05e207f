"""What can end a run: each error says what happened and what to do."""

from hvd_ext.async_ps.exit_deadline import set_exit_deadline


class ServerLost(RuntimeError):
    """A server died or does not answer; the last checkpoint is the way back."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        set_exit_deadline()


class ServerStopped(RuntimeError):
    """The server was stopped on purpose (Ctrl-C, a signal, an error in its schedule)."""


class WorkerEvicted(RuntimeError):
    """This worker was silent for longer than the server waits and no longer takes part."""
