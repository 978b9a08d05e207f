"""A table that is also the weight of a linear layer: both parts of each sample's gradient in one block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hvd_ext.seng import LayerPlan
from hvd_ext.torch.seng.blocks import BLOCKS, Block, Chooser, FactoredBlock
from hvd_ext.torch.seng.embedding import CHUNK_NUMEL, EmbeddingBlock
from hvd_ext.torch.seng.kernels import to_compute_dtype


@dataclass(eq=False)
class TiedEmbeddingBlock(Block):
    """``u_i`` is that of ``table`` plus that of ``product``, whose one group has the table's rows as n_G.

    No rows are sampled: ``U^T U`` needs the products of the one part with the other.
    """

    product: FactoredBlock
    table: EmbeddingBlock

    @property
    def sample_count(self) -> int:
        return self.product.sample_count

    @property
    def r(self) -> int:
        return max(self.product.r, self.table.r)

    @property
    def itemsize(self) -> int:
        return self.product.itemsize

    def held_tensors(self) -> list[torch.Tensor]:
        return [*self.product.held_tensors(), *self.table.held_tensors()]

    def block_state(self) -> dict[str, Any]:
        return {"type": "Tied", "product": self.product.block_state(), "table": self.table.block_state()}

    def row_scores(self, label: str) -> torch.Tensor | None:
        return None

    def sample_rows(self, plan: LayerPlan, choose: Chooser) -> None:
        """Nothing is sampled."""

    def without_sketch(self) -> TiedEmbeddingBlock:
        return TiedEmbeddingBlock(self.product.without_sketch(), self.table.without_sketch())

    def sketches_by_name(self) -> dict[str, torch.Tensor]:
        return {**{f"product/{name}": xi for name, xi in self.product.sketches_by_name().items()},
                **{f"table/{name}": xi for name, xi in self.table.sketches_by_name().items()}}

    def set_gathered(self, name: str, gathered: torch.Tensor) -> None:
        part, _, inner = name.partition("/")
        (self.product if part == "product" else self.table).set_gathered(inner, gathered)

    def pad_columns(self, r: int) -> None:
        self.product.pad_columns(r)
        self.table.pad_columns(r)

    def gram_matrix(self) -> torch.Tensor:
        cross = self._cross_gram()
        return self.product.gram_matrix() + self.table.gram_matrix() + cross + cross.mT

    def _cross_gram(self) -> torch.Tensor:
        """``C_ij``, the table's part of sample i times the product's of sample j: (rho, rho).

        ``sum_t sum_k G_j[row_it, k] (g_it · A_j[:, k])``, a part of the columns k of all j at a time.
        """
        table, product = self.table, self.product
        width, r, rho = table.xg.shape[1], product.xg.shape[2], product.xg.shape[-1]
        rows = table.xrows.mT.reshape(-1)  # (rho T,)
        values = to_compute_dtype(table.xg[0]).permute(2, 1, 0).reshape(-1, width)  # (rho T, E)
        left, right = to_compute_dtype(product.xg[0]), to_compute_dtype(product.xa[0, :product.width])
        total = values.new_zeros((rho, rho))
        step = max(1, CHUNK_NUMEL // max(1, rows.numel() * rho))
        for start in range(0, r, step):
            part = slice(start, start + step)
            weights = values @ right[:, part].reshape(width, -1)
            found = F.embedding(rows, left[:, part].reshape(left.shape[0], -1))
            total += (found * weights).view(rho, -1, weights.shape[1] // rho, rho).sum((1, 2))
        return total

    def project_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.product.project_gradient(gradients) + self.table.project_gradient(gradients)

    def message_size(self, uc: str) -> int:
        return self.product.message_size(uc) + self.table.message_size(uc)

    def local_contribution(self, b: torch.Tensor, own: torch.Tensor, ranks: int, uc: str,
                           out: torch.Tensor) -> None:
        cut = self.product.message_size(uc)
        self.product.local_contribution(b, own, ranks, uc, out[:cut])
        self.table.local_contribution(b, own, ranks, uc, out[cut:])

    def apply_direction(self, mean: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                        uc: str) -> None:
        cut = self.product.message_size(uc)
        gradients[0].sub_(mean[cut:])
        self.product.apply_direction(mean[:cut], gradients, lam, uc)

    def apply_single_rank(self, b: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                          uc: str) -> None:
        self.table.add_contribution(gradients[0].view(self.table.height, -1), -b)
        self.product.apply_single_rank(b, gradients, lam, uc)


BLOCKS["Tied"] = TiedEmbeddingBlock
