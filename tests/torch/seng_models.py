"""Miniatures of architectures that keep their samples elsewhere than on axis 0 of every layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Windows(nn.Module):
    """Swin's: attention within windows, which are rolled; (B, T, E) becomes (B windows, side, E)."""

    def __init__(self, width: int = 4, side: int = 2, roll: int = 0) -> None:
        super().__init__()
        self.side, self.roll = side, roll
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, E)
        b, t, e = x.shape
        z = torch.roll(self.norm(x), self.roll, 1).reshape(b * t // self.side, self.side, e)
        q, k, v = self.qkv(z).chunk(3, -1)
        z = self.project(F.scaled_dot_product_attention(q, k, v)).reshape(b, t, e)
        return self.head((x + torch.roll(z, -self.roll, 1)).mean(1))


class Flattened(nn.Module):
    """OPT's feed-forward: batch and time flattened before it, time first or batch first."""

    def __init__(self, width: int = 4, time_first: bool = False) -> None:
        super().__init__()
        self.time_first = time_first
        self.embed = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 6), nn.Linear(6, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, E)
        x = self.embed(x)
        z = x.transpose(0, 1) if self.time_first else x
        shape = z.shape
        z = self.outer(torch.tanh(self.inner(self.norm(z.reshape(-1, shape[-1])))))
        z = z.reshape(shape)
        x = x + (z.transpose(0, 1) if self.time_first else z)
        return self.head(x.mean(1))


class SequenceFirst(nn.Module):
    """``nn.TransformerEncoder`` as it is by default: its input is (T, B, E)."""

    def __init__(self, width: int = 4, turn: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.turn = turn
        one = nn.TransformerEncoderLayer(width, 2, 8, dropout=dropout)
        self.encoder = nn.TransformerEncoder(one, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1) if self.turn else x
        return self.head(self.encoder(x).mean(0))


class TimeMajor(nn.Module):
    """A recurrent network over (T, B, E) whose head sees every step."""

    def __init__(self, width: int = 4, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(width, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, E)
        return self.head(self.rnn(x.transpose(0, 1))[0]).mean(0)


class LastState(nn.Module):
    """A classifier on a recurrent network's last states, and on its output if ``both``."""

    def __init__(self, kind: type[nn.RNNBase], both: bool = False, **options) -> None:
        super().__init__()
        self.rnn = kind(4, 5, batch_first=True, **options)
        self.head = nn.Linear(5, 3)
        self.both = both

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, E)
        out, state = self.rnn(x)
        states = state if isinstance(state, tuple) else (state,)
        last = sum(s[-1] for s in states)
        return self.head(last + out.mean(1) if self.both else last)


class Experts(nn.Module):
    """Tokens go to one of several experts; one may get none."""

    def __init__(self, width: int = 4, experts: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, E)
        rows = x.reshape(-1, x.shape[-1])
        goes = (rows[:, 0] > 0).long() + (rows[:, 0] > 9).long()
        out = torch.zeros_like(rows)
        for k, expert in enumerate(self.experts):
            mine = (goes == k).nonzero().flatten()
            out = out.index_copy(0, mine, torch.tanh(expert(rows[mine])))
        return self.head(out.reshape(x.shape).mean(1))


class Packed(nn.Module):
    """Experts in one parameter, given tokens and where each goes, one after another: not to be vectorised."""

    def __init__(self, width: int = 4, experts: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width, width) / width**0.5)

    def forward(self, rows: torch.Tensor, goes: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(rows)
        for k in goes.unique():
            mine = (goes == k).nonzero().flatten()
            out = out.index_add(0, mine, torch.tanh(rows[mine] @ self.weight[k]))
        return out


class PackedExperts(nn.Module):
    """As :class:`Experts`, with :class:`Packed` weights."""

    def __init__(self, width: int = 4, experts: int = 3) -> None:
        super().__init__()
        self.embed, self.packed = nn.Linear(width, width), Packed(width, experts)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, E)
        x = torch.tanh(self.embed(x))
        rows = x.reshape(-1, x.shape[-1])
        goes = (rows[:, 0].detach() > 0).long() + (rows[:, 1].detach() > 0).long()
        return self.head(self.packed(rows, goes).reshape(x.shape).mean(1))


class Graphs(nn.Module):
    """A batch of graphs: (nodes, E), the mean over neighbours, and which graph a node is of."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor, graph: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(adjacency @ x))
        x = torch.tanh(self.second(adjacency @ x))
        pooled = x.new_zeros(int(graph.max()) + 1, 5).index_add(0, graph, x)
        return self.head(pooled)


class Language(nn.Module):
    """GPT-2's parts: token and position embeddings, ``Conv1D`` with its weight (in, out), RMS norms."""

    def __init__(self, vocabulary: int = 11, width: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(8, width)
        self.norm = RMS(width)
        self.inner, self.outer = Conv1D(6, width), Conv1D(width, 6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T)
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]).unsqueeze(0))
        x = x + self.outer(torch.tanh(self.inner(self.norm(x))))
        return self.head(x).mean(1)


class Conv1D(nn.Module):
    """As transformers has it: ``addmm`` of rows, weight (in, out)."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.randn(width, out) * 0.5)
        self.bias = nn.Parameter(torch.randn(out) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], self.nf)


class RMS(nn.Module):
    """Gemma's RMS norm: the scale is 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Images(nn.Module):
    """timm's subclasses: norms over channels, batch norm with its activation, standardised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Standardised(2, 4, 3, padding=1)
        self.norm = ChannelNorm(4)
        self.same = Same(4, 4, 3, stride=2)
        self.active = ActiveBatchNorm(4)
        self.gamma = Gamma(4)
        self.plain = Renamed(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.same(torch.tanh(self.norm(self.stem(x))))
        return self.plain(self.gamma(self.active(x)).mean((2, 3)))


class Standardised(nn.Conv2d):
    """NFNet's: the weight is standardised over its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, variance = self.weight.mean((1, 2, 3), True), self.weight.var((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (variance + 1e-4).sqrt(), self.bias, padding=self.padding)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Same(nn.Conv2d):
    """Padded as TensorFlow pads, by what the input's size asks for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        need = [max((-(-size // s) - 1) * s + k - size, 0)
                for size, s, k in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)]
        x = F.pad(x, (need[1] // 2, need[1] - need[1] // 2, need[0] // 2, need[0] - need[0] // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class ActiveBatchNorm(nn.BatchNorm2d):
    """Batch norm and its activation in one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(super().forward(x))


class Gamma(nn.Module):
    """A layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma[:, None, None]


class Renamed(nn.Linear):
    """A linear layer that says nothing new."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Past(nn.Module):
    """A weight that is used past its module's ``forward`` too (Mamba's ``dt_proj``)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.mixed, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mixed(x)) + x @ self.mixed.weight.T)
