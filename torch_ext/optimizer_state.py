"""The state of a distributed optimizer: the wrapped optimizer's and, under "hvd_ext", the extensions'."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hvd_ext.torch.collectives import SHARED_ERRORS

if TYPE_CHECKING:
    from hvd_ext.torch.wrapper import Wrapper

STATE_KEY = "hvd_ext"


def state_dict(wrapper: Wrapper, state: dict[str, Any], *, gather: bool) -> dict[str, Any]:
    """The wrapped optimizer's ``state`` and, under "hvd_ext", this rank's of the extensions.

    Args:
        wrapper: the extensions.
        state: of the wrapped optimizer, as this rank holds it.
        gather: complete it with what other ranks own; a collective.
    """
    own: dict[str, Any] = {"rank": wrapper.collectives.rank, "size": wrapper.collectives.size,
                           "reducer": wrapper.reducer.state_dict()}
    if wrapper.preconditioner is not None:
        own["preconditioner"] = wrapper.preconditioner.state_dict()
    if wrapper.server is not None:
        serve = wrapper.server.gather if gather else wrapper.server.state_dict
        state, own["server"] = serve(state)
    return {**state, STATE_KEY: own}


def shared_state(wrapper: Wrapper) -> dict[str, Any]:
    """What is the same on every rank: a rank that joins takes it over."""
    seng = wrapper.preconditioner
    return {"errors": len(SHARED_ERRORS), "reducer": wrapper.reducer.shared_state(),
            "step": None if seng is None else seng.shared_state()}


def load_shared_state(wrapper: Wrapper, state: dict[str, Any]) -> None:
    """Take over what another rank's :func:`shared_state` gave, and compare the ranks' settings again."""
    wrapper.forget()
    SHARED_ERRORS[:] = ["before this rank joined"] * state["errors"]
    wrapper.reducer.load_shared_state(state["reducer"])
    if wrapper.preconditioner is not None:
        wrapper.preconditioner.load_shared_state(state["step"])
    wrapper.reducer.met = None


def load_state_dict(wrapper: Wrapper, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None], *,
                    reset_per_rank_state: bool) -> None:
    """Restore the extensions, and with ``load`` the wrapped optimizer.

    Raises:
        ValueError: the state is another rank's or of another number of ranks.
    """
    state_dict = dict(state_dict)
    own = state_dict.pop(STATE_KEY, None)
    if own is not None and not (reset_per_rank_state or wrapper.reducer.staleness) \
            and own.get("reducer", {}).get("late"):
        raise ValueError("this state was saved with late= and may hold a gradient that is still to be "
                         "applied; pass late= here too, or reset_per_rank_state=True to drop it")
    if own is not None and not (reset_per_rank_state or getattr(wrapper.server, "replies", None)) \
            and own.get("server", {}).get("reply"):
        raise ValueError("this state was saved with Server(reply=...), and the weights that its ranks "
                         "held lack what was still to be sent; pass reply= here too, or save the model "
                         "within optimizer.exact_weights() and pass reset_per_rank_state=True")
    here = (wrapper.collectives.rank, wrapper.collectives.size)
    per_rank = own is not None and any(own.get(key) for key in ("reducer", "preconditioner"))
    if per_rank and not reset_per_rank_state and (own["rank"], own["size"]) != here:
        raise ValueError(
            f"this state was saved by rank {own['rank']} of {own['size']} and is loaded by rank "
            f"{here[0]} of {here[1]}, but the extensions keep state per rank; save and load "
            "one file per rank, or pass reset_per_rank_state=True to start that state anew"
        )
    wrapper.forget()
    load_wrapped(wrapper, state_dict, None if own is None else own.get("server"), load)
    anew = own is None or reset_per_rank_state
    if anew or "reducer" not in own:
        wrapper.reducer.reset_per_rank_state()
    else:
        wrapper.reducer.load_state_dict(own["reducer"])
    if wrapper.preconditioner is not None:
        if anew or "preconditioner" not in own:
            wrapper.preconditioner.reset_state()
        else:
            wrapper.preconditioner.load_state_dict(own["preconditioner"])


def load_wrapped(wrapper: Wrapper, state: dict[str, Any], mark: dict[str, Any] | None,
                 load: Callable[[dict[str, Any]], None]) -> None:
    """Restore the wrapped optimizer with ``load``; ``mark`` is the server's, from the same state."""
    if wrapper.server is not None:
        state = wrapper.server.load_state_dict(state, mark)
    load(state)
    original = wrapper.original()
    if original is not None:  # a scheduler that was made before wrapping goes on setting its groups
        original.param_groups, original.state = wrapper.optimizer.param_groups, wrapper.optimizer.state


def report(wrapper: Wrapper) -> dict[str, Any]:
    """Figures of the last step: bytes by kind, and those of each extension in use."""
    traffic = wrapper.collectives.traffic
    figures = {"sent": dict(traffic.last_sent), "received": dict(traffic.last_received),
               **wrapper.reducer.report()}
    for name, extension in (("preconditioner", wrapper.preconditioner), ("server", wrapper.server)):
        if extension is not None:
            figures[name] = extension.report()
    return figures
