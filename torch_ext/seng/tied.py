"""A table that is also the weight of a linear layer: both parts of each sample's gradient in one block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hvd_ext.seng import LayerPlan
from hvd_ext.torch.seng.blocks import BLOCKS, Block, Chooser, Product
from hvd_ext.torch.seng.kernels import working
from hvd_ext.torch.seng.lookup import CHUNK, Table


@dataclass(eq=False)
class Tied(Block):
    """``u_i`` is that of ``table`` plus that of ``product``, whose one group has the table's rows as n_G.

    No rows are sampled: ``U^T U`` needs the products of the one part with the other.
    """

    product: Product
    table: Table

    @property
    def samples(self) -> int:
        return self.product.samples

    @property
    def r(self) -> int:
        return max(self.product.r, self.table.r)

    @property
    def itemsize(self) -> int:
        return self.product.itemsize

    def tensors(self) -> list[torch.Tensor]:
        return [*self.product.tensors(), *self.table.tensors()]

    def state(self) -> dict[str, Any]:
        return {"type": "Tied", "product": self.product.state(), "table": self.table.state()}

    def row_scores(self, label: str) -> torch.Tensor | None:
        return None

    def sketch(self, plan: LayerPlan, choose: Chooser) -> None:
        """Nothing is sampled."""

    def unsketched(self) -> Tied:
        return Tied(self.product.unsketched(), self.table.unsketched())

    def sketches(self) -> dict[str, torch.Tensor]:
        return {**{f"product/{name}": xi for name, xi in self.product.sketches().items()},
                **{f"table/{name}": xi for name, xi in self.table.sketches().items()}}

    def join(self, name: str, gathered: torch.Tensor) -> None:
        part, _, inner = name.partition("/")
        (self.product if part == "product" else self.table).join(inner, gathered)

    def pad(self, r: int) -> None:
        self.product.pad(r)
        self.table.pad(r)

    def gram(self) -> torch.Tensor:
        cross = self._cross()
        return self.product.gram() + self.table.gram() + cross + cross.mT

    def _cross(self) -> torch.Tensor:
        """``C_ij``, the table's part of sample i times the product's of sample j: (rho, rho).

        ``sum_t sum_k G_j[row_it, k] (g_it · A_j[:, k])``, a part of the columns k of all j at a time.
        """
        table, product = self.table, self.product
        width, r, rho = table.xg.shape[1], product.xg.shape[2], product.xg.shape[-1]
        rows = table.xrows.mT.reshape(-1)  # (rho T,)
        values = working(table.xg[0]).permute(2, 1, 0).reshape(-1, width)  # (rho T, E)
        left, right = working(product.xg[0]), working(product.xa[0, :product.width])
        total = values.new_zeros((rho, rho))
        step = max(1, CHUNK // max(1, rows.numel() * rho))
        for start in range(0, r, step):
            part = slice(start, start + step)
            weights = values @ right[:, part].reshape(width, -1)
            found = F.embedding(rows, left[:, part].reshape(left.shape[0], -1))
            total += (found * weights).view(rho, -1, weights.shape[1] // rho, rho).sum((1, 2))
        return total

    def project(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.product.project(gradients) + self.table.project(gradients)

    def message_size(self, uc: str) -> int:
        return self.product.message_size(uc) + self.table.message_size(uc)

    def message(self, b: torch.Tensor, own: torch.Tensor, ranks: int, uc: str,
                out: torch.Tensor) -> None:
        cut = self.product.message_size(uc)
        self.product.message(b, own, ranks, uc, out[:cut])
        self.table.message(b, own, ranks, uc, out[cut:])

    def subtract(self, mean: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                 uc: str) -> None:
        cut = self.product.message_size(uc)
        gradients[0].sub_(mean[cut:])
        self.product.subtract(mean[:cut], gradients, lam, uc)

    def subtract_alone(self, b: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                       uc: str) -> None:
        self.table.add(gradients[0].view(self.table.height, -1), -b)
        self.product.subtract_alone(b, gradients, lam, uc)


BLOCKS["Tied"] = Tied
