"""Which patcher runs the edits of a model."""

from __future__ import annotations

from typing import Any

from rmfast.engine.scorer import Scorer
from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.suffix_patcher import SuffixPatcher


def patcher_of(scorer: Scorer) -> Any:
    """The suffix engine where it knows the model's layers, else the model's own forward with hooks.

    Raises:
        ValueError: the model is under corrections by length; its body has no list of its layers; its head pools.
    """
    if scorer.interventions is not None and scorer.interventions.lengths:
        raise ValueError("Expected a model without corrections by length, which no activation has a part in")
    if scorer.pools and scorer.binding.reads_rows:
        raise ValueError("Expected a head that reads one token of a text, got one that pools all of its tokens")
    engine = scorer.packed_engine()
    if isinstance(engine, str) or engine.why or scorer.binding.clamps_last:
        return LayersPatcher(scorer.binding)
    return SuffixPatcher(engine)
