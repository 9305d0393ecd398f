"""SpinQuant (arXiv 2405.16406): the matrices of ``rotation.py`` learned on a calibration text, by Cayley SGD.

What falls is the loss of the *quantised* network, ternary weights and 4-bit activations, with straight-through
gradients; the weights of the model stay. Matrices stay orthonormal because a step moves along the Cayley transform.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import TrainingError
from .calibration import Batch
from .rotation import Rotations

EPSILON = 1e-8


class CayleySGD(torch.optim.Optimizer):
    """SGD with momentum on the Stiefel manifold (Li, Fuxin and Todorovic, ICLR 2020, algorithm 1), of square matrices.

    With the momentum ``M <- momentum M - G`` and ``U = M X^T - 1/2 X (X^T M X^T)`` a step is

        W = U - U^T,   X <- (I - a/2 W)^-1 (I + a/2 W) X,   M <- W X,   a = min(lr, 1 / ||W||_1)

    The reference implementation iterates towards that X; here the linear system is solved, so that X stays orthonormal
    to rounding.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step for all matrices that have a gradient; ``closure`` is not used."""
        del closure
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                momentum = group["momentum"] * state.get("momentum", torch.zeros_like(x)) - x.grad
                state["momentum"] = _move(x, momentum, group["lr"])


def _move(x: Tensor, momentum: Tensor, lr: float) -> Tensor:
    """Move ``x`` along ``momentum`` in place; returns the momentum in the tangent space."""
    u = momentum @ x.T
    u = u - 0.5 * x @ (x.T @ u)
    w = u - u.T
    size = min(lr, 1.0 / (float(torch.linalg.matrix_norm(w, 1)) + EPSILON))
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    tangent = w @ x
    x.copy_(torch.linalg.solve(identity - size / 2 * w, x + size / 2 * tangent))
    return tangent


def learn_rotations(
    model: PreTrainedModel,
    rotations: Rotations,
    calibration: Sequence[Batch],
    *,
    steps: int = 100,
    learning_rate: float = 1.5,
) -> list[float]:
    """Learn the matrices of a rotated model in place; returns the loss at every step.

    Args:
        model: what ``rotate`` returned, with its quantisers on.
        calibration: batches of token ids ``[B, T]``, taken in turn.
        steps: the paper's 100.
        learning_rate: the paper's 1.5, falling linearly to 0.

    Raises:
        TrainingError: there is no batch, or the loss is not finite.
    """
    if not calibration:
        raise TrainingError("no calibration batch was given to learn rotations on; give text")
    optimizer = CayleySGD(rotations.parameters(), learning_rate)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        ids = calibration[step % len(calibration)]["input_ids"].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"the loss of the rotated model is {losses[-1]} at step {step}: lower learning_rate"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses
