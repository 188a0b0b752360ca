"""Activations whose bits do not depend on where in a tensor an element stands.

torch's own round the elements of a whole vector register in one way and the remainder in another,
so a token's last bit would depend on its batch. `exp` and `log1p` do not.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

_SOFTPLUS_IS_IDENTITY_ABOVE = 20.0


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.where(x > _SOFTPLUS_IS_IDENTITY_ABOVE, x, torch.log1p(torch.exp(x)))
