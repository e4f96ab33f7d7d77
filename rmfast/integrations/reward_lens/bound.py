"""The models that reward-lens wraps, bound once each."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import nn

from rmfast.binding.modules import has_hooks
from rmfast.engine.packed import Engine
from rmfast.engine.scorer import Scorer
from rmfast.integrations.reward_lens.theirs import Outside

_guard = threading.RLock()
# A Scorer holds its model: kept as long as what reward-lens wraps the model in (a runtime, its RewardModel), it
# goes when they go; other wrappers of the same model find it in _by_model.
_by_owner: weakref.WeakKeyDictionary[Any, Scorer | str] = weakref.WeakKeyDictionary()
_by_model: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Scorer]] = weakref.WeakKeyDictionary()


def bound_model(owner: Any) -> Scorer:
    """The model of a runtime or of reward-lens' RewardModel, bound; Outside where its own forward has more to do."""
    for name, module in owner.model.named_modules():
        if has_hooks(module):
            raise Outside(f"hooks on {name or 'the model'}")
        if module.training:
            raise Outside("the model is in training mode")
    with _guard:
        found = _by_owner.get(owner)
        if found is None or (isinstance(found, Scorer) and found.model is not owner.model):
            known = _by_model.get(owner.model)
            found = known() if known is not None else None
            if found is None:
                found = bind_model(owner.model)
            _by_owner[owner] = found
            if isinstance(found, Scorer):
                _by_model[owner.model] = weakref.ref(found)
    if isinstance(found, str):
        raise Outside(found)
    return found


def bind_model(model: nn.Module) -> Scorer | str:
    """A model on our engines, or why its own forward has more to do."""
    try:
        rm = Scorer(model)
    except ValueError as error:
        return str(error)
    if not rm.binding.causal or not rm.binding.head:
        return "tokens of its model see those behind them, or it pools by itself"
    rm.warned |= {"end", "ids"}  # a text with padding is read where reward-lens reads it, and nobody asked rmfast
    return rm


def packed_engine(rm: Scorer) -> Engine:
    """The engine of packed runs; Outside where the model has none."""
    engine = rm.packed_engine()
    if isinstance(engine, str):
        raise Outside(f"not packed: {engine}")
    return engine
