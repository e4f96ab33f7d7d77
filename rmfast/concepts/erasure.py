"""LEACE: the smallest affine edit after which no linear map of the activations knows a concept (arXiv 2306.03819).

    r(x) = x − W⁺ P W (x − μ)     W = (Σ_xx^{1/2})⁺, P the orthogonal projection onto the columns of W Σ_xz

After it the covariance of activations and labels is 0, and of all affine maps for which it is, this one moves the
activations least. W⁺PW is oblique: for two classes it takes δ (β·(x − μ)) / (β·δ) off x, with the difference δ of the
classes' means and β = Σ_xx⁻¹ δ, so it is no `rmfast.DirectionRemoval`, which takes off what lies along one direction.

The covariance of a few hundred texts in thousands of dimensions has no inverse to speak of: it is shrunk towards a
multiple of the identity (Ledoit and Wolf). The labels' covariance is 0 afterwards whatever the shrinkage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from rmfast import arguments
from rmfast.concepts.activations import checked_site
from rmfast.concepts.concept import Interval, sides
from rmfast.concepts.labels import Logistic, folds, told_right
from rmfast.engine.options import RunOptions, takes
from rmfast.engine.scorer import Scorer
from rmfast.resampling import cluster_means, drawn, percentiles

if TYPE_CHECKING:
    from typing_extensions import Unpack

_JSON, _TENSORS = "erasure.json", "erasure.safetensors"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Erasure:
    """r(x) = x − left (right (x − mean)).

    Attributes:
        left: (d, k) fp64, what is taken off; right: (k, d) fp64, how much of it; right · left is the identity.
        mean: (d,) fp64.
        shrinkage: of the covariance, in [0, 1].
        site, layer: where it was fitted, None for `leace` of an array.
        before, after: of `erase`, the share of held-out pairs that a logistic probe tells right, trained on activations
            as they are, and on erased ones.
        name, fingerprint: of the concept and the model.
    """

    left: Tensor
    right: Tensor
    mean: Tensor
    shrinkage: float
    site: str | None = None
    layer: int | None = None
    before: Interval | None = None
    after: Interval | None = None
    name: str = "concept"
    fingerprint: str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d) erased, in x's dtype, computed in fp64."""
        d = self.mean.numel()
        if not isinstance(x, Tensor) or x.dim() < 1 or x.size(-1) != d:
            raise ValueError(f"Expected x to be activations of shape (..., {d}), got {arguments.shown(x)}")
        left, right, mean = (part.to(x.device) for part in (self.left, self.right, self.mean))
        wide = x.double()
        return (wide - (wide - mean) @ right.T @ left.T).to(x.dtype)

    @property
    def rank(self) -> int:
        """How many dimensions are taken off."""
        return self.left.size(1)

    def removal(self) -> dict[str, Any]:
        """Refused: ValueError, since an oblique edit is no `rmfast.DirectionRemoval`. A `Concept` is one."""
        raise ValueError(
            "Expected an orthogonal projection for a DirectionRemoval, got LEACE's, which is oblique and about a mean: "
            "see concepts.erased for the rewards under it, or take a Concept's removal()"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes erasure.json and erasure.safetensors into the folder `path`, made where there is none."""
        folder = arguments.path("path", path)
        folder.mkdir(parents=True, exist_ok=True)
        about = {name: getattr(self, name) for name in ("shrinkage", "site", "layer", "name", "fingerprint")}
        ends = {name: None if (x := getattr(self, name)) is None else [*x] for name in ("before", "after")}
        tensors = {name: getattr(self, name).contiguous() for name in ("left", "right", "mean")}
        safetensors.torch.save_file(tensors, folder / _TENSORS)
        (folder / _JSON).write_text(json.dumps({"format": 1, **about, **ends}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Erasure:
        """Reads what `save` wrote; ValueError where the folder holds no erasure."""
        folder = arguments.path("path", path)
        try:
            about = json.loads((folder / _JSON).read_text(encoding="utf-8"))
            if about.pop("format") != 1:
                raise ValueError("another format")
            about |= {name: None if about[name] is None else Interval(*about[name]) for name in ("before", "after")}
            return cls(**about | safetensors.torch.load_file(folder / _TENSORS))
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"Expected {path} to hold an erasure as save() writes it, got {error}") from error

    def __repr__(self) -> str:
        where = "" if self.site is None else f" at {self.site}" + ("" if self.layer is None else f" of {self.layer}")
        told = "" if self.before is None else f", held-out accuracy {self.before} before and {self.after} after"
        return f"Erasure({self.name!r}{where}, {self.rank} of {self.mean.numel()} dimensions{told})"


def leace(x: Any, z: Any, *, shrinkage: float | Literal["ledoit_wolf"] = "ledoit_wolf") -> Erasure:
    """The LEACE eraser of labels from activations.

    Args:
        x: (n, d) activations.
        z: (n,) or (n, k) labels: 0 and 1, or one column for each class or number.
        shrinkage: of the covariance towards a multiple of the identity: (1 − λ) Σ + λ tr(Σ)/d. Ledoit and Wolf's λ
            (scikit-learn), or a number in [0, 1]; 0 gives LEACE as published.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite; labels that are all equal, or that the
            activations know nothing of.
        ImportError: scikit-learn is not there, for Ledoit and Wolf's.
    """
    shrinkage = _checked_shrinkage(shrinkage)
    x = arguments.finite("x", x, "n", "d")
    z = arguments.finite("z", z)
    z = z[:, None] if z.ndim == 1 else z
    if z.ndim != 2 or len(z) != len(x):
        raise ValueError(f"Expected z to be of shape ({len(x)},) or ({len(x)}, k), got {z.shape}")
    if len(x) < 2:
        raise ValueError(f"Expected x of at least two texts, got {len(x)}")
    mean = x.mean(0)
    centred = x - mean
    shrinkage = _ledoit_wolf(centred) if shrinkage == "ledoit_wolf" else shrinkage
    # In the span of the activations, where the covariance is diagonal: beyond it the labels have no covariance.
    _, s, basis = np.linalg.svd(centred, full_matrices=False)
    variance = (1 - shrinkage) * s**2 / len(x) + shrinkage * float((s**2).sum()) / len(x) / x.shape[1]
    there = s > s[0] * max(x.shape) * np.finfo(np.float64).eps
    basis, root = basis[there], np.sqrt(variance[there])
    covariance = basis @ (centred.T @ (z - z.mean(0))) / len(x)  # (r, k)
    u, size, _ = np.linalg.svd(covariance / root[:, None], full_matrices=False)
    u = u[:, size > 1e-9 * float(np.abs(z - z.mean(0)).max())]
    if not u.shape[1]:
        raise ValueError("Expected labels that differ and that the activations know something of, got no covariance")
    left, right = basis.T @ (root[:, None] * u), (u / root[:, None]).T @ basis
    return Erasure(
        left=torch.from_numpy(left), right=torch.from_numpy(right), mean=torch.from_numpy(mean), shrinkage=shrinkage
    )


def _checked_shrinkage(given: Any) -> float | Literal["ledoit_wolf"]:
    return (
        "ledoit_wolf"
        if isinstance(given, str) and given == "ledoit_wolf"
        else arguments.number('shrinkage, where it is not "ledoit_wolf",', given, 0, 1)
    )


def _ledoit_wolf(centred: np.ndarray) -> float:
    try:
        from sklearn.covariance import ledoit_wolf_shrinkage
    except ImportError as error:
        raise ImportError(
            f'Ledoit and Wolf\'s shrinkage needs scikit-learn (pip install "rmfast[concepts]"): {error}'
        ) from error
    return float(ledoit_wolf_shrinkage(centred, assume_centered=True))


@takes(RunOptions)
def erase(
    rm: Scorer,
    pairs: Sequence[Any],
    *,
    name: str = "concept",
    site: str = "final",
    layer: int | None = None,
    shrinkage: float | Literal["ledoit_wolf"] = "ledoit_wolf",
    penalty: float = 0.01,
    folds: int = 5,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Erasure:
    """The LEACE eraser of a concept from pairs of texts that differ in it, and what a probe still finds.

    `before` and `after` are held out: eraser and logistic probe are made of the other folds' pairs. So `after` says
    what is left of the concept in new texts, of which the eraser knows nothing; a half is chance.

    Arguments and errors are those of `rmfast.concepts.fit` and `leace`.
    """
    site, layer = checked_site(rm, site, layer)
    arguments.instance("name", name, str)
    penalty, shrinkage = arguments.number("penalty", penalty, 0, above=True), _checked_shrinkage(shrinkage)
    confidence = arguments.number("confidence", confidence, 0, 1, above=True, below=True)
    folds, resamples = arguments.whole("folds", folds, 2), arguments.whole("resamples", resamples, 1)
    seed = arguments.whole("seed", seed, 0)
    with_, without, of = sides(rm, pairs, site, layer, **options)
    arguments.whole("folds", folds, 2, int(of.max()) + 1)
    labels = np.ones((1, len(of)))
    before = told_right(Logistic(with_, without, penalty), labels, of, folds, seed)[0]
    after = _told_right_erased(with_, without, shrinkage, penalty, of, folds, seed)
    right = cluster_means(np.stack([before, after], 1), of)
    draws = [
        weights @ right / weights.sum(1, keepdims=True) for weights in drawn(np.arange(len(right)), resamples, seed)
    ]
    low, high = percentiles(np.concatenate(draws), confidence)
    found = [Interval(*map(float, ends)) for ends in zip(right.mean(0), low, high)]
    return replace(
        leace(*_labelled(with_, without), shrinkage=shrinkage), site=site, layer=layer, before=found[0],
        after=found[1], name=name, fingerprint=rm.fingerprint,
    )  # fmt: skip


def _labelled(with_: np.ndarray, without: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([with_, without]), np.repeat([1.0, 0.0], len(with_))


def _told_right_erased(
    with_: np.ndarray, without: np.ndarray, shrinkage: Any, penalty: float, of: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """(n,) as `told_right`, of a probe that is trained on erased activations."""
    right = np.empty(len(with_))
    for train, test in folds(of, count, seed):
        eraser = leace(*_labelled(with_[train], without[train]), shrinkage=shrinkage)
        erased = [eraser(torch.from_numpy(side)).numpy() for side in (with_, without)]
        margins = Logistic(erased[0], erased[1], penalty).margins(np.ones((1, len(with_))), train, test)[0]
        right[test] = (margins > 0) + 0.5 * (margins == 0)
    return right
