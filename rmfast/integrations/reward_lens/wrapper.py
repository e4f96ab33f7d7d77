"""reward-lens' RewardModel: where its reward is one of ours, and the text that a call of it is given."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.binding.find import probe_ids
from rmfast.binding.proof import reward_scale
from rmfast.engine.scorer import Scorer
from rmfast.integrations.reward_lens.bound import bound_model
from rmfast.integrations.reward_lens.theirs import Outside
from rmfast.texts.inputs import Encoded

# By wrapper: the adapter and functions that make its reward, and whether that is rm.score's.
_agrees: weakref.WeakKeyDictionary[Any, tuple[weakref.ref, list, bool]] = weakref.WeakKeyDictionary()


def wrapped_model(wrapper: Any) -> Scorer:
    """Its model, bound, and its reward known to be the first label where `rm.score` reads it."""
    adapter = wrapper.adapter
    if not type(adapter).__module__.startswith("reward_lens."):
        raise Outside("an adapter of its own")
    rm = bound_model(wrapper)
    makers = [getattr(f, "__func__", f) for f in (adapter.extract_reward, adapter.extract_reward_batch)]
    known = _agrees.get(wrapper)
    if known is None or known[0]() is not adapter or known[1] != makers:
        known = _agrees[wrapper] = weakref.ref(adapter), makers, _reads_first_label(wrapper, rm)
    if not known[2]:
        raise Outside("its adapter makes the reward in another way")
    return rm


def reward_of(rm: Scorer, ids: np.ndarray) -> float:
    """The first label of one text, as `rm.score` reads it."""
    return float(rm.run([Encoded(ids)], [np.array([rm.position(ids, 0)])])[0][0, 0])


def one_text(rm: Scorer, inputs: dict[str, Tensor]) -> tuple[np.ndarray, int]:
    """Token ids of the one text in a wrapper's inputs, and where the model reads its reward."""
    ids = inputs["input_ids"]
    if ids.size(0) != 1 or not ids.size(1):
        raise Outside("several texts, or none: run as the one batch that they are")
    if inputs.keys() - {"input_ids", "attention_mask"}:
        raise Outside(f"inputs beside token ids ({', '.join(sorted(inputs))})")
    if "attention_mask" in inputs and not bool(inputs["attention_mask"].all()):
        raise Outside("a text whose attention mask leaves tokens out")
    row = ids[0].cpu().numpy()
    return row, rm.position(row, 0)


def _reads_first_label(wrapper: Any, rm: Scorer) -> bool:
    """Tried on a few tokens, forwards and backwards and with padding at the end, as another rule may read it."""
    ids = probe_ids(rm.binding.root, rm.binding.vocab_size, None, ())
    texts = [ids, ids.flip(1), torch.cat([ids, torch.full_like(ids[:, :1], rm.binding.pad_id)], 1)]
    values, wanted = [], []
    for text in texts:
        inputs = {"input_ids": text.to(wrapper.device), "attention_mask": torch.ones_like(text).to(wrapper.device)}
        try:
            with torch.no_grad():
                out = wrapper.model(**inputs)
                one, batch = (
                    f(out, inputs).detach().double().cpu().reshape(())
                    for f in (wrapper.adapter.extract_reward, wrapper.adapter.extract_reward_batch)
                )
        except (RuntimeError, ValueError, AttributeError, IndexError, TypeError):
            return False
        wanted += [one, batch]
        values += [reward_of(rm, text[0].numpy())] * 2
    got = torch.tensor(values, dtype=torch.float64)
    # Another rule is off by the rewards' own size, bf16 by a percent of their scale.
    with torch.no_grad():
        return bool(((got - torch.stack(wanted)).abs() <= 0.03 * reward_scale(rm.binding, got)).all())
