"""RewardModel's forward with cache, of which ComponentAttribution and RewardLens are made: one packed run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rmfast.integrations.reward_lens.bound import packed_engine
from rmfast.integrations.reward_lens.patched import check_places
from rmfast.integrations.reward_lens.theirs import Outside, submodule
from rmfast.integrations.reward_lens.wrapper import one_text, wrapped_model
from rmfast.patching.patcher import patcher_of
from rmfast.patching.suffix_patcher import SuffixPatcher
from rmfast.texts.inputs import Encoded

_STREAMS = ("resid_post", "attn_out", "mlp_out")


def cached(original: Any, self: Any, inputs: dict[str, Tensor], cache_full_sequences: bool = False) -> Any:
    reward, found = _activations(self, inputs, slice(None) if cache_full_sequences else _last(inputs), heads=False)
    cache = submodule("model").ActivationCache()
    cache.final_token_positions = torch.full_like(inputs["input_ids"][:, 0], inputs["input_ids"].size(1) - 1)
    streams = (cache.residual_streams, cache.attn_outputs, cache.mlp_outputs)
    whole = (cache.raw_residual_streams, cache.raw_attn_outputs, cache.raw_mlp_outputs)
    for kind, last, full in zip(_STREAMS, streams, whole):
        last.update({layer: x[:, -1] for layer, x in found[kind].items()})
        full.update(found[kind] if cache_full_sequences else {})
    return float(reward), cache


def cached_batch(original: Any, self: Any, inputs: dict[str, Tensor], capture_heads: bool = False) -> Any:
    reward, found = _activations(self, inputs, _last(inputs), heads=capture_heads)
    cache = submodule("model").BatchedActivationCache()
    cache.final_token_positions = torch.full_like(inputs["input_ids"][:, 0], inputs["input_ids"].size(1))
    for kind, last in zip(_STREAMS, (cache.residual_streams, cache.attn_outputs, cache.mlp_outputs)):
        last.update({layer: x[:, -1] for layer, x in found[kind].items()})
    if capture_heads:
        cache.attn_head_outputs.update({layer: x[:, -1] for layer, x in found["head_out"].items()})
    return cache, reward.float().to(self.device)


def _activations(
    wrapper: Any, inputs: dict[str, Tensor], rows: slice, heads: bool
) -> tuple[Tensor, dict[str, dict[int, Tensor]]]:
    """Rewards (1,) and activations (1, rows, ...) by kind and layer; the embedding is resid_post of layer −1."""
    rm = wrapped_model(wrapper)
    ids, read = one_text(rm, inputs)
    if read != len(ids) - 1:
        raise Outside("the reward is read before the last token")
    if any(rm.binding.length_group(len(ids))):
        raise Outside("rotary frequencies that depend on a text's length")
    packed_engine(rm)
    patcher = patcher_of(rm)
    if not isinstance(patcher, SuffixPatcher) or any(fused.sandwich for _, fused in patcher.engine.layers):
        raise Outside("layers that are not Llama's by structure")
    adapter, layers = wrapper.adapter, range(patcher.layers)
    modules = adapter.get_layers(wrapper.model)
    if len(modules) != patcher.layers:
        raise Outside("other layers than rmfast's")
    at = {"attn_out": adapter.get_attn_module, "mlp_out": adapter.get_mlp_module, "head_out": adapter.get_attn_o_proj}
    kinds = [*_STREAMS, *(["head_out"] if heads else [])]
    places = [(kind, layer, at[kind](modules[layer])) for kind in kinds if kind in at for layer in layers]
    check_places(rm, places, wrapper.n_heads if heads else None)
    with rm.binding.session():
        record = patcher.record(Encoded(ids), read, set(kinds), base=False)
        found = {kind: {i: record.activations(kind, i)[rows] for i in layers} for kind in kinds}
    with torch.no_grad():
        embedded = adapter.get_embedding(wrapper.model)(inputs["input_ids"][:, rows])
        out: dict[str, dict[int, Tensor]] = {"resid_post": {-1: embedded}}
        for kind, each in found.items():  # outside of inference mode: ordinary tensors, of these rows alone
            named = {i: (x if kind == "head_out" else x[:, 0])[None].clone() for i, x in each.items()}
            out.setdefault(kind, {}).update(named)
    return record.reward[:1].clone(), out


def _last(inputs: dict[str, Tensor]) -> slice:
    return slice(inputs["input_ids"].size(1) - 1, None)
