"""Refit of a head on new data with the body frozen: linear maps of the rows that a head reads, from one packed run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rmfast.arguments import array, finite, number, word
from rmfast.binding.session import on_the_host
from rmfast.heads.linear import Linear


def rows(rm: Any, inputs: Sequence[Any], *, positions: Sequence[int] | None = None, **options: Any) -> Tensor:
    """The final normed hidden states (N, d) at the token where `rm.score` reads each input, on the CPU, in fp32 (fp64
    for an fp64 model): all that a linear head is given.

    Raises:
        ValueError: the model pools by itself; as for `RewardModel.score`, whose other arguments `options` are.
    """
    if rm.pools:
        raise ValueError(
            "Expected a model whose reward is read at a token, got one that pools the whole text by itself"
        )
    running = [options.pop(name, default) for name, default in _RUNNING.items()]
    encoded = rm.encode(inputs, **options)

    def normed(hidden: Tensor, at: Tensor) -> Tensor:
        x = rm.binding.normed(hidden, at)[0]
        return x.to(torch.promote_types(x.dtype, torch.float32))

    with on_the_host():
        found = rm.run(encoded, rm.reads(encoded, positions), *running, normed)
        return torch.cat(found) if found else torch.empty(0, rm.binding.width)


_RUNNING = {"batch_tokens": None, "progress": False, "engine": None}


def fit(
    rm: Any, inputs: Any, targets: Any = None, *, pairs: Any = None, loss: Literal["ridge", "logistic"] | None = None,
    l2: float = 0.1, positions: Sequence[int] | None = None, **options: Any,
) -> Linear:  # fmt: skip
    """A linear head for `rm`'s body, fitted to targets or preferences; the body stays as it is (arXiv 2206.08871).

        ridge      mean (w·x + b − y)² + l2 ‖s ⊙ w‖²
        logistic   mean −log σ(±(w·x + b)) + l2/2 ‖s ⊙ w‖², for pairs x = x_chosen − x_rejected and no b

    with s the standard deviations of the rows' entries: the penalty is that of entries of variance 1.

    Args:
        rm: a `RewardModel` whose reward is read at a token.
        inputs: as for `rm.score`; or their rows (N, d), as `rmfast.heads.rows` gives them.
        targets: (N,) or (N, K) real numbers; for "logistic" (N,), each 0 or 1.
        pairs: (P, 2) in place of targets, of inputs by place: the chosen and the rejected one.
        loss: default "ridge" for targets, "logistic" for pairs.
        l2: the penalty, above 0.
        positions, options: as for `rm.score`.

    Returns:
        A `Linear` that is read where `rm` is: `rmfast.RewardModel(rm.model, rm.tokenizer, head=head)`.

    Raises:
        InputError, ValueError, TypeError: as `rm.score`; targets or pairs that do not fit, or are both given.
    """
    l2 = number("l2", l2, 0, above=True)
    if (targets is None) == (pairs is None):
        raise ValueError("Expected targets or pairs, got " + ("neither" if pairs is None else "both"))
    default = "ridge" if pairs is None else "logistic"
    kind = word("loss", default if loss is None else loss, ("ridge", "logistic"))
    given = isinstance(inputs, Tensor) and inputs.dim() == 2 and inputs.is_floating_point()
    if given and options:
        raise TypeError(f"Expected no {min(options)} with rows")
    found = inputs if given else rows(rm, inputs, positions=positions, **options)
    x = finite("the rows of inputs", found, "N", "d")
    if len(x) < 2 or x.shape[1] != rm.binding.width:
        raise ValueError(f"Expected inputs to be at least two, of width {rm.binding.width}, got {x.shape}")
    spread = x.std(0)
    spread[spread == 0] = 1.0  # of no influence: a constant is the bias
    if pairs is not None:
        if kind != "logistic":
            raise ValueError(f'Expected loss to be "logistic" with pairs, got {kind!r}')
        at = _places(pairs, len(x))
        weight, bias = _logistic((x[at[:, 0]] - x[at[:, 1]]) / spread, np.ones(len(at)), l2, False)
    elif kind == "logistic":
        y = array("targets", targets, len(x))
        if not np.isin(y, (0, 1)).all():
            raise ValueError('Expected targets to be 0 or 1 for loss="logistic"')
        weight, bias = _logistic((x - x.mean(0)) / spread, 2 * y - 1, l2, True)
    else:
        y = finite("targets", targets)
        y = y[:, None] if y.ndim == 1 else y
        if y.ndim != 2 or len(y) != len(x) or not y.shape[1]:
            raise ValueError(f"Expected targets to be ({len(x)},) or ({len(x)}, K), got {np.shape(targets)}")
        z = (x - x.mean(0)) / spread
        gram = z.T @ z / len(z) + l2 * np.eye(z.shape[1])
        weight, bias = np.linalg.solve(gram, z.T @ (y - y.mean(0)) / len(z)).T, y.mean(0)
    weight = weight / spread
    if pairs is None:
        bias = bias - weight @ x.mean(0)
    reading = rm.pooling if rm.pooling != "auto" else rm.binding.reading
    with torch.inference_mode(False):
        kept = torch.from_numpy(weight).to(torch.float32)
        return Linear(weight=kept, bias=None if pairs is not None else torch.from_numpy(bias).to(kept), reading=reading)


def _places(pairs: Any, count: int) -> np.ndarray:
    found = finite("pairs", pairs, "P", 2)
    if not len(found) or (found != found.round()).any() or found.min() < 0 or found.max() >= count:
        raise ValueError(f"Expected pairs to be (P, 2) places of inputs in [0, {count}), got {found.tolist()[:3]} ...")
    return found.astype(np.int64)


def _logistic(z: np.ndarray, sign: np.ndarray, l2: float, biased: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weight (1, d) and bias (1,) of the least mean −log σ(sign (w·z + b)) + l2/2 ‖w‖²."""
    from scipy.optimize import minimize

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (z @ w[:-1] + w[-1])
        pull = -sign * np.exp(-np.logaddexp(0, margin)) / len(z)
        gradient = np.append(z.T @ pull + l2 * w[:-1], pull.sum() if biased else 0.0)
        return float(np.logaddexp(0, -margin).mean() + l2 / 2 * w[:-1] @ w[:-1]), gradient

    found = minimize(objective, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    return found[None, :-1], found[-1:]
