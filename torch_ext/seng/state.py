"""What SENG keeps between steps, as a dict and back, and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hvd_ext.seng import Report, elements_held
from hvd_ext.torch.seng.blocks import Block, Curvature, Explicit, Product
from hvd_ext.torch.seng.inventory import Layer

if TYPE_CHECKING:
    from hvd_ext.torch.seng import SENG

FORMAT = 1
_SYSTEM = ("rho", "kappa", "r", "step", "gram", "offset", "total", "ranks", "jitter",
           "coefficients")


def save(seng: SENG) -> dict[str, Any]:
    """The state as plain containers and tensors; waits for what is under way."""
    pending = None
    if seng._pending is not None:
        seng._pending = {layer: seng._wait(started) for layer, started in seng._pending.items()}
        pending = {layer.name: message for layer, message in seng._pending.items()}
    previous = seng._previous
    return {
        "format": FORMAT,
        "ranks": _ranks(seng),
        "step": seng._step,
        "due": seng._due,
        "skipped": seng._skipped,
        "failures": dict(seng._failures),
        "settings": _described(seng),
        "layers": {layer.name: _save_curvature(one) for layer, one in seng._curvatures.items()},
        "pending": pending,
        "previous": None if previous is None else {
            layer.name: list(flat) for layer, flat in previous.items()},
    }


def load(seng: SENG, state: dict[str, Any]) -> None:
    """Put a saved state in place.

    Raises:
        ValueError: another format, model, settings or number of ranks; nothing is changed then.
    """
    if state.get("format") != FORMAT:
        raise ValueError(f"SENG's state has format {state.get('format')!r}, not {FORMAT}; it was "
                         "saved by another version: call reset_state() instead")
    if state["ranks"] != _ranks(seng):
        raise ValueError(f"SENG's state was saved by {state['ranks']} ranks and there are "
                         f"{_ranks(seng)} now; call reset_state() to start its curvature anew")
    mine = _described(seng)
    odd = sorted(key for key in mine if state["settings"].get(key) != mine[key])
    if odd:
        raise ValueError(
            f"SENG's state was saved with other settings: {odd[0]} was "
            f"{state['settings'].get(odd[0])!r} and is {mine[odd[0]]!r}; construct SENG as it was, "
            "or call reset_state()")
    names = {layer.name: layer for layer in seng._layers}
    unknown = sorted(set(state["layers"]) - set(names))
    if unknown:
        raise ValueError(f"SENG's state has a layer {unknown[0]!r} that this model has not; load "
                         "it into the model it was saved with, or call reset_state()")
    curvatures = {names[name]: _load_curvature(names[name], one)
                  for name, one in state["layers"].items()}
    seng.reset_state()
    seng._curvatures = {layer: curvatures[layer] for layer in seng._layers if layer in curvatures}
    seng._step, seng._due = int(state["step"]), bool(state["due"])
    seng._skipped, seng._failures = int(state["skipped"]), dict(state["failures"])
    for key in ("pending", "previous"):
        saved = state[key]
        if saved is not None:
            setattr(seng, f"_{key}", {
                names[name]: _to_device(names[name], tensors) for name, tensors in saved.items()})
    seng._arm()


def report(seng: SENG) -> Report:
    """Data of every layer, see :data:`hvd_ext.seng.report.COLUMNS`."""
    rows = []
    for layer in seng._layers:
        shape, plan = layer.shape, layer.plan
        row: dict[str, Any] = {
            "layer": layer.name, "kind": shape.kind,
            "held": "implicit" if plan.implicit else "explicit",
            "n": shape.n, "n_G": shape.n_g, "n_A": shape.n_a, "groups": shape.groups,
            "sketch": _sketch_said(layer), "bytes": 0, "formula_bytes": 0,
            "failures": seng._failures.get(layer.name, 0),
        }
        curvature = seng._curvatures.get(layer)
        if curvature is None:
            row["held"] = "identity"
        else:
            b = curvature.coefficients
            size = _element_size(curvature.blocks[0])
            row.update(
                rho=curvature.rho, kappa=curvature.kappa, rank=curvature.r or None,
                bytes=curvature.nbytes(), jitter=curvature.jitter,
                formula_bytes=size * elements_held(shape, plan, rho=curvature.rho, r=curvature.r),
                coefficient_norm=None if b is None else float(b.norm()),
                age=seng._step - curvature.step,
            )
        rows.append(row)
    owned = {id(p) for layer in seng._curvatures for p in layer.parameters}
    rest = sum(p.numel() for p in seng.model.parameters()
               if p.requires_grad and id(p) not in owned)
    return Report(
        layers=rows, step=seng._step, damping=seng.settings.damping_at(seng._step),
        coupling=seng.settings.coupling, ranks=_ranks(seng),
        bytes=sum(row["bytes"] for row in rows),
        formula_bytes=sum(row["formula_bytes"] for row in rows),
        identity_parameters=rest, failures=sum(seng._failures.values()), skipped=seng._skipped,
        seconds_waited=seng.waited,
    )


def _ranks(seng: SENG) -> int:
    if not seng._attached:
        seng._find_ranks()
    return max(1, seng._ranks)


def _described(seng: SENG) -> dict[str, Any]:
    """Settings that the saved tensors depend on."""
    wanted = ("coupling", "uc", "explicit_threshold", "sketch", "sketch_size", "replacement",
              "rank", "row_sketch", "seed")
    return {key: getattr(seng.settings, key) for key in wanted}


def _sketch_said(layer: Layer) -> str | None:
    plan = layer.plan
    if plan.implicit:
        rows = [str(count or "all") for count in (plan.rows_g, plan.rows_a)]
        return " × ".join(rows) if plan.rows_g or plan.rows_a else None
    return None if plan.sketch is None else str(plan.sketch)


def _element_size(block: Block) -> int:
    return (block.u if isinstance(block, Explicit) else block.g).element_size()


def _save_curvature(curvature: Curvature) -> dict[str, Any]:
    return {
        "blocks": [{"type": type(block).__name__, **vars(block)} for block in curvature.blocks],
        **{key: getattr(curvature, key) for key in _SYSTEM},
    }


def _load_curvature(layer: Layer, saved: dict[str, Any]) -> Curvature:
    types: dict[str, type[Block]] = {"Explicit": Explicit, "Product": Product}
    device = layer.parameters[0].device
    blocks = []
    for one in saved["blocks"]:
        fields = {key: value.to(device) if isinstance(value, torch.Tensor) else value
                  for key, value in one.items() if key != "type"}
        blocks.append(types[one["type"]](**fields))
    system = {key: saved[key].to(device) if isinstance(saved[key], torch.Tensor) else saved[key]
              for key in _SYSTEM}
    return Curvature(blocks=blocks, **system)


def _to_device(layer: Layer, tensors: Any) -> Any:
    device = layer.parameters[0].device
    if isinstance(tensors, torch.Tensor):
        return tensors.to(device)
    return [tensor.to(device) for tensor in tensors]
