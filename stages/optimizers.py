"""Optimisers of gradient rounding by name, over torch's protocol: a parameter with a gradient, and a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..formats.errors import UsageError


class Original(torch.optim.Optimizer):
    """Plain steps against the gradient. That of a norm, unlike that of its square, keeps its length on the way."""

    def __init__(self, parameters: list[torch.Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A closure is not asked."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])


@dataclass(frozen=True)
class Optimizer:
    """One of the optimisers."""

    make: Callable[[list[torch.Tensor], float], torch.optim.Optimizer]
    """From parameters and learning rate."""
    rate: float
    """Default learning rate."""
    tensors: int
    """Float32 tensors of the parameter's shape that state and step take at most."""
    grace: int = 0
    """First steps in which it finds its pace by itself."""


def _prodigy(parameters: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
    try:
        from prodigyplus import ProdigyPlusScheduleFree
    except ImportError:
        raise UsageError(
            "optimizer prodigy needs the package prodigy-plus-schedule-free: pip install 'quantloom[prodigy]'; "
            "or choose original, adamw or radam"
        ) from None
    made: torch.optim.Optimizer = ProdigyPlusScheduleFree(
        parameters, lr=lr, use_schedulefree=False, split_groups=False, stochastic_rounding=False
    )
    return made


OPTIMIZERS: dict[str, Optimizer] = {
    "original": Optimizer(Original, 0.1, 0),
    "adamw": Optimizer(lambda parameters, lr: torch.optim.AdamW(parameters, lr, foreach=False), 0.05, 4),
    "radam": Optimizer(lambda parameters, lr: torch.optim.RAdam(parameters, lr, foreach=False), 0.1, 6),
    "prodigy": Optimizer(_prodigy, 1.0, 4, grace=50),
}
"""The steps of the projected-gradient method; Adam with decoupled decay (Loshchilov and Hutter, arXiv
1711.05101); rectified Adam (Liu et al., arXiv 1908.03265); Prodigy (Mishchenko and Defazio, arXiv 2306.06101)."""
