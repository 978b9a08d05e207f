"""The curvature of a table of which each sample uses a few rows (embeddings): only those are held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from hvd_ext.seng import LayerPlan
from hvd_ext.torch.seng.blocks import BLOCKS, Block, Chooser
from hvd_ext.torch.seng.kernels import samples_first, samples_last, to_compute_dtype

CHUNK_NUMEL = 1 << 22  # numbers of a dense part of U that are formed at once


@dataclass(eq=False)
class EmbeddingBlock(Block):
    """``u_i`` has ``g[:, t, i]`` added to row ``rows[t, i]`` of parameter ``index``, (height, E), for each t.

    ``rows`` (r, rho) int64 and ``g`` (1, E, r, rho); ``xrows``, ``xg`` are those of all ranks' samples in
    full coupling, else the same. There is nothing to sketch: ``U^T U`` costs rho² times the rows used.
    """

    index: int
    height: int
    rows: torch.Tensor
    g: torch.Tensor
    xrows: torch.Tensor
    xg: torch.Tensor

    @property
    def sample_count(self) -> int:
        return self.rows.shape[-1]

    @property
    def r(self) -> int:
        return self.rows.shape[0]

    @property
    def itemsize(self) -> int:
        return self.g.element_size()

    def row_scores(self, label: str) -> torch.Tensor | None:
        return None

    def sample_rows(self, plan: LayerPlan, choose: Chooser) -> None:
        """Nothing is sampled."""

    def without_sketch(self) -> EmbeddingBlock:
        return replace(self, xrows=self.rows, xg=self.g)

    def sketches_by_name(self) -> dict[str, torch.Tensor]:
        return {"xrows": self.xrows.mT.contiguous(), "xg": samples_first(self.xg)}

    def set_gathered(self, name: str, gathered: torch.Tensor) -> None:
        if name == "xrows":
            self.xrows = gathered.mT.contiguous()
        else:
            self.xg = samples_last(gathered)

    def pad_columns(self, r: int) -> None:
        # A column of zeros for row 0 adds nothing.
        missing, apart = r - self.r, self.xg is not self.g
        if missing > 0:
            self.rows, self.g = F.pad(self.rows, (0, 0, 0, missing)), F.pad(self.g, (0, 0, 0, missing))
            if apart:
                self.xrows = F.pad(self.xrows, (0, 0, 0, missing))
                self.xg = F.pad(self.xg, (0, 0, 0, missing))
            else:
                self.xrows, self.xg = self.rows, self.g

    def gram_matrix(self) -> torch.Tensor:
        rho, width = self.xrows.shape[-1], self.xg.shape[1]
        used, place = torch.unique(self.xrows, return_inverse=True)
        values = to_compute_dtype(self.xg[0]).permute(1, 2, 0).reshape(-1, width)  # (r rho, E)
        sample = torch.arange(rho, device=values.device).expand_as(place).reshape(-1)
        order = torch.argsort(place.reshape(-1), stable=True)
        values, sample, place = values[order], sample[order], place.reshape(-1)[order]
        total = values.new_zeros((rho, rho))
        step = max(1, CHUNK_NUMEL // max(1, rho * width))
        for start in range(0, used.numel(), step):
            low, high = torch.searchsorted(place, place.new_tensor([start, start + step])).tolist()
            dense = values.new_zeros((rho * min(step, used.numel() - start), width))
            at = sample[low:high] * (len(dense) // rho) + place[low:high] - start
            part = dense.index_add_(0, at, values[low:high]).view(rho, -1)
            total.addmm_(part, part.mT)
        return total

    def project_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        z = gradients[self.index].view(self.height, -1)
        found = F.embedding(self.xrows, z)  # (r, rho, E)
        return (found * self.xg[0].permute(1, 2, 0).to(z.dtype)).sum((0, 2))

    def message_size(self, uc: str) -> int:
        return self.height * self.g.shape[1]

    def local_contribution(self, b: torch.Tensor, own: torch.Tensor, ranks: int, uc: str,
                           out: torch.Tensor) -> None:
        self.add_contribution(out.zero_().view(self.height, -1), own * ranks ** 0.5 if ranks > 1 else own)

    def add_contribution(self, table: torch.Tensor, c: torch.Tensor) -> None:
        """``table += U c`` (SENG eq. 25)."""
        weighed = (self.g[0].to(c.dtype) * c).permute(1, 2, 0).reshape(-1, table.shape[1])
        table.index_add_(0, self.rows.reshape(-1), weighed)

    def to_dense(self) -> torch.Tensor:
        """U as (rho, height E), for a layer that holds one as large in any case."""
        height, width, rho = self.height, self.g.shape[1], self.sample_count
        u = self.g.new_zeros((rho * height, width))
        at = self.rows.mT + height * torch.arange(rho, device=u.device).unsqueeze(1)
        u.index_add_(0, at.reshape(-1), self.g[0].permute(2, 1, 0).reshape(-1, width))
        return u.view(rho, -1)

    def apply_direction(self, mean: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                        uc: str) -> None:
        gradients[self.index].sub_(mean).mul_(1.0 / lam)

    def apply_single_rank(self, b: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                          uc: str) -> None:
        gradient = gradients[self.index]
        self.add_contribution(gradient.view(self.height, -1), -b)
        gradient.mul_(1.0 / lam)


BLOCKS["Table"] = EmbeddingBlock
