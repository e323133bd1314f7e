"""Muon: momentum whose update is made orthogonal, for the 2-D matrices of a network's hidden layers.

All matrices of one shape are orthogonalised in one batched product, so a step costs about a hundred kernel launches
whatever the number of layers. The update is scaled to the RMS of an AdamW step, so both can share a learning rate.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices, by a quintic Newton-Schulz iteration in bf16; (N, R, C), R <= C."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters; `parts[p]` = how many stacked square-ish matrices a parameter holds (fused QKV: 3)."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        parts: dict[Tensor, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._parts = parts or {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            looked_ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov
            batches: dict[tuple[int, int], list[tuple[int, Tensor]]] = defaultdict(list)
            for i, (p, update) in enumerate(zip(parameters, looked_ahead, strict=True)):
                for matrix in self._split(p, update):
                    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
                    batches[tuple(wide.shape)].append((i, wide))
            pieces: dict[int, list[Tensor]] = defaultdict(list)
            for batch in batches.values():
                for (i, _), done in zip(batch, orthogonal(torch.stack([m for _, m in batch])).unbind(), strict=True):
                    pieces[i].append(done)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for i, p in enumerate(parameters):
                update = self._join(p, pieces[i])
                p.add_(update.to(p.dtype), alpha=-0.2 * group["lr"] * max(pieces[i][0].shape) ** 0.5)

    def _split(self, p: Tensor, update: Tensor) -> list[Tensor]:
        """The matrices within a parameter: GPT-NeoX interleaves Q, K and V by head, (heads * 3 * size, hidden)."""
        if p not in self._parts:
            return [update]
        heads, parts = self._parts[p]
        return list(update.view(heads, parts, -1, p.shape[1]).transpose(0, 1).reshape(parts, -1, p.shape[1]).unbind())

    def _join(self, p: Tensor, pieces: list[Tensor]) -> Tensor:
        if p not in self._parts:
            return pieces[0] if pieces[0].shape == p.shape else pieces[0].mT
        heads, parts = self._parts[p]
        return torch.stack(pieces).view(parts, heads, -1, p.shape[1]).transpose(0, 1).reshape(p.shape)
