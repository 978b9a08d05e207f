"""Horovod for PyTorch Lightning, with the extensions: ``Trainer(strategy=HorovodStrategy(...))``.

Ranks are started by ``horovodrun`` or ``mpirun``, as any Horovod script's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only  # type: ignore[import-not-found,unused-ignore]
from lightning.pytorch.core.optimizer import LightningOptimizer  # type: ignore[import-not-found,unused-ignore]
from lightning.pytorch.strategies import ParallelStrategy  # type: ignore[import-not-found,unused-ignore]

import hvd_ext.torch as hvd
from hvd_ext.sharding import settings_of
from hvd_ext.torch.distributed_optimizer_class import ExtendedOptimizer
from hvd_ext.torch.persistence.optimizer_state import STATE_KEY

BY_RANK = "hvd_ext_by_rank"


def reduce_gradients(optimizer: Any) -> None:
    """Reduce this step's gradients, unless they are; ``step()`` then takes them as they are."""
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer._optimizer
    if isinstance(optimizer, ExtendedOptimizer):
        optimizer._hvd_ext.synchronize(settle=True)


class HorovodStrategy(ParallelStrategy):  # type: ignore[misc,unused-ignore]
    """Every optimizer of the module becomes a ``hvd.DistributedOptimizer``.

    A checkpoint holds the extensions' state of all ranks, and the moments of all parameters, whichever
    rank has them; ``Trainer.fit(ckpt_path=...)`` on as many ranks goes on from there bit for bit.
    Gradients are reduced before ``gradient_clip_val``, ``clip_gradients()`` and ``on_before_optimizer_step``
    see them. ``server="rank0"`` and ``"sharded"`` cannot be used: Lightning steps with a closure.

    Args:
        preconditioner: a function of the module that makes one, such as
            ``lambda module: hvd.SENG(module.net, damping=0.1)``.
        options: further arguments of ``hvd.DistributedOptimizer``: ``op``, ``compression``,
            ``gradient_predivide_factor``, ``groups``, ...

    Raises:
        ValueError: at construction, for a server that cannot be used.
    """

    strategy_name = "horovod"

    def __init__(self, *, preconditioner: Callable[[torch.nn.Module], Any] | None = None,
                 accelerator: Any = None, checkpoint_io: Any = None, precision_plugin: Any = None,
                 **options: Any) -> None:
        server = options.get("server")
        if server is not None and settings_of(server).kind != "replicated":
            raise ValueError(f"server={options['server']!r} cannot be used with Lightning, which steps "
                             "with a closure; use server='replicated'")
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io,
                         precision_plugin=precision_plugin)
        hvd.init()
        self._options = options
        self._preconditioner = preconditioner
        rank_zero_only.rank = hvd.rank()

    # Who and where

    @property
    def global_rank(self) -> int:
        return int(hvd.rank())

    @property
    def local_rank(self) -> int:
        return int(hvd.local_rank())

    @property
    def node_rank(self) -> int:
        return int(hvd.cross_rank())

    @property
    def world_size(self) -> int:
        return int(hvd.size())

    @property
    def is_distributed(self) -> bool:
        """Lightning gives every rank its own part of the data."""
        return True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def root_device(self) -> torch.device:
        if self.parallel_devices and self.parallel_devices[0].type == "cuda":
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")

    def model_to_device(self) -> None:
        self.model.to(self.root_device)

    # Set-up

    def setup_optimizers(self, trainer: Any) -> None:
        """Make the module's optimizers and wrap them; all ranks start from rank 0's weights."""
        hvd.broadcast_parameters(self.lightning_module.state_dict(), root_rank=0)
        super().setup_optimizers(trainer)
        made = None if self._preconditioner is None else self._preconditioner(self.lightning_module)
        if made is not None and len(self.optimizers) > 1:
            raise ValueError("preconditioner= goes with one optimizer, and configure_optimizers() made "
                             f"{len(self.optimizers)}")
        options = self._options if made is None else {**self._options, "preconditioner": made}
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None:
            options = {"grad_scaler": scaler, **options}
        names = {id(p): name for name, p in self.lightning_module.named_parameters()}
        wrapped = {}
        for optimizer in self.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            wrapped[id(optimizer)] = hvd.DistributedOptimizer(
                optimizer, named_parameters=[(names[id(p)], p) for p in parameters],
                backward_passes_per_step=trainer.accumulate_grad_batches, **options)
        for config in self.lr_scheduler_configs:
            config.scheduler.optimizer = wrapped[id(config.scheduler.optimizer)]
            # The schedule was made before wrapping and would take the first step for none.
            config.scheduler.optimizer._opt_called = True
        self.optimizers = list(wrapped.values())
        self._reduce_before_clipping()

    def _reduce_before_clipping(self) -> None:
        """``clip_gradients()`` of manual optimization, too, sees reduced gradients."""
        clip = self.precision_plugin.clip_gradients

        @functools.wraps(clip)
        def clip_reduced(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            reduce_gradients(optimizer)
            clip(optimizer, *args, **kwargs)

        self.precision_plugin.clip_gradients = clip_reduced

    def post_backward(self, closure_loss: torch.Tensor) -> None:
        """After the last backward pass of a step: with 16-mixed nothing else stands before unscaling."""
        super().post_backward(closure_loss)
        module = self.lightning_module
        if module.automatic_optimization and not module.trainer.fit_loop._should_accumulate():
            for optimizer in self.optimizers:
                reduce_gradients(optimizer)

    # Exchange

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean (by default) or sum of a metric over all ranks."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        summed = str(getattr(reduce_op, "name", reduce_op)).lower() == "sum"
        wide = tensor if tensor.is_floating_point() or summed else tensor.float()
        return hvd.allreduce(wide, op=hvd.Sum if summed else hvd.Average, name="lightning/reduce")

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """All ranks' tensors (ranks, ...)."""
        return hvd.allgather(tensor[None] if sync_grads else tensor.detach()[None],  # type: ignore[no-any-return,unused-ignore]
                             name="lightning/all_gather")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Rank ``src``'s object on all ranks."""
        return hvd.broadcast_object(obj, src, name="lightning/broadcast")

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        if hvd.is_initialized():
            hvd.barrier()

    # Checkpoints: Lightning asks every rank for the optimizers' state, and rank 0 writes it

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's whole state, with every rank's part of the extensions'; on every rank."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        if not isinstance(optimizer, ExtendedOptimizer):
            return super().optimizer_state(optimizer)  # type: ignore[no-any-return,unused-ignore]
        state = optimizer.gather_state_dict()
        own = state.pop(STATE_KEY)
        state[BY_RANK] = optimizer._hvd_ext.collectives.allgather_object(own, "lightning/state")
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its own part.

        Raises:
            ValueError: the checkpoint is of another number of ranks and holds state per rank.
        """
        states = []
        for state in checkpoint["optimizer_states"]:
            state = dict(state)
            by_rank = state.pop(BY_RANK, None)
            if by_rank is not None:
                state[STATE_KEY] = by_rank[min(self.global_rank, len(by_rank) - 1)]
            states.append(state)
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})
