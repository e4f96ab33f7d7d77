"""Activations of texts at one named site, at the token where the reward is read, from one pass of the body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rmfast import arguments
from rmfast.engine.options import RunOptions, takes
from rmfast.engine.scorer import Scorer
from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.watched import SiteRows, run_watched

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The stream that the final norm is given, what it gives to the head, and sites of a layer (`rmfast.patching.sites`).
SITES = ("final", "normed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
OF_LAYERS = SITES[2:]


@takes(RunOptions)
def activations(
    rm: Scorer, inputs: Sequence[Any], *, site: str = "final", layer: int | None = None, **options: Unpack[RunOptions]
) -> Tensor:
    """What the model has at a site for each text, at the token where `score` reads, from one pass of the body.

    Args:
        rm: a model that reads its reward at one token.
        inputs: as for `RewardModel.score`.
        site: "final", the stream that the final norm is given; "normed", what it gives to the head; or of `layer`
            "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out".
        layer: from 0, negative from the end; for sites of a layer alone.
        options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`).

    Returns:
        (N, d), on the CPU; fp32 (fp64 for an fp64 model).

    Raises:
        InputError: as for `score`.
        ValueError: the model pools by itself, or lacks the site; layer without a site of layers, or the other way
            round; interventions beside clamps.
    """
    return run(rm, inputs, *checked_site(rm, site, layer), **options)


def checked_site(rm: Any, site: Any, layer: Any) -> tuple[str, int | None]:
    """The site, with its layer from 0 on, by name where the model has no such place."""
    arguments.instance("rm", rm, Scorer)
    arguments.word("site", site, SITES)
    if rm.pools:
        raise ValueError(f"{type(rm.binding.root).__name__} pools by itself: no stream of a token makes its reward")
    rm.expect_clamps_alone()
    if site not in OF_LAYERS:
        if layer is not None:
            raise ValueError(f"Expected no layer for site {site!r}, got {arguments.shown(layer)}")
        if site == "final" and not rm.binding.leaves_norm_out:
            raise ValueError('Expected site="normed": the model has no final norm, or one with hooks')
        return site, None
    if layer is None:
        raise ValueError(f"Expected a layer for site {site!r}, got None")
    count = LayersPatcher(rm.binding).layers
    return site, arguments.indices("layer", arguments.whole("layer", layer), count)[0]


def run(
    rm: Scorer, inputs: Sequence[Any], site: str, layer: int | None, *, batch_tokens: int | None = None,
    progress: bool = False, **encoding: Any,
) -> Tensor:  # fmt: skip
    """`activations` of a site that was checked."""
    texts = rm.encode(inputs, **encoding)
    at = [np.array([i]) for i in rm.positions(texts)]
    bound, taps, packed, seen = rm.binding, [], True, None
    if layer is not None:
        patcher = LayersPatcher(bound)
        seen = SiteRows(patcher, layer, site)
        bound, taps, packed = patcher.binding, seen.taps, seen.packed

    def read(hidden: Tensor, rows: Tensor) -> Tensor:
        if site == "normed":
            return bound.normed(hidden, rows)[0]
        stream = hidden.reshape(-1, hidden.size(-1))[rows]
        return stream if seen is None else seen.rows(stream)

    found = run_watched(rm, bound, taps, texts, at, read, batch_tokens, progress, packed)
    rows = torch.cat([values for values, _ in found]) if found else torch.empty(0, rm.binding.width)
    return rows if rows.dtype == torch.float64 else rows.float()
