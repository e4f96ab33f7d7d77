"""ActivationPatcher's three grids (2.0.1) on the suffix engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from rmfast.integrations.reward_lens.patched import check_places, component_cells, head_cells, patched_rewards
from rmfast.integrations.reward_lens.theirs import Outside, submodule
from rmfast.integrations.reward_lens.wrapper import one_text, reward_of, wrapped_model
from rmfast.patching.patcher import patcher_of
from rmfast.patching.suffix_patcher import SuffixPatcher


def patch_all_components(
    original: Any, self: Any, prompt: str, preferred: str, dispreferred: str, mode: str = "noising",
    max_length: int = 2048, show_progress: bool = True, mean_corpus: Any = None,
) -> Any:  # fmt: skip
    if mode not in ("noising", "denoising", "zero"):
        raise Outside(f"mode {mode!r}")  # "mean" comes back as patch_all_components_mean
    return _patched_pair(self, prompt, (preferred, dispreferred), mode, max_length)


def patch_all_heads(
    original: Any, self: Any, prompt: str, preferred: str, dispreferred: str, mode: str = "noising",
    max_length: int = 2048, show_progress: bool = True,
) -> Any:  # fmt: skip
    if mode not in ("noising", "denoising"):
        raise Outside(f"mode {mode!r}")
    return _patched_pair(self, prompt, (preferred, dispreferred), f"head-{mode}", max_length)


def patch_all_components_mean(
    original: Any, self: Any, prompt: str, preferred: str, dispreferred: str, corpus_pairs: Any,
    max_length: int = 2048, show_progress: bool = True,
) -> Any:  # fmt: skip
    if not isinstance(corpus_pairs, list | tuple) or not corpus_pairs:
        raise Outside("a corpus that is no list of pairs, or has none")

    def means() -> dict[tuple[str, int], Tensor]:
        total: dict[tuple[str, int], Tensor] = {}
        for pair in corpus_pairs:
            _, cache = self.model.forward_with_cache(*pair, cache_full_sequences=False, max_length=max_length)
            for kind, rows in (("attn_out", cache.attn_outputs), ("mlp_out", cache.mlp_outputs)):
                for layer, x in rows.items():
                    total[kind, layer] = total.get((kind, layer), 0) + x[0].float()
        return {place: x / len(corpus_pairs) for place, x in total.items()}

    return _patched_pair(self, prompt, (preferred, dispreferred), "mean", max_length, means)


def _patched_pair(
    patcher: Any,
    prompt: str,
    answers: tuple[str, str],
    mode: str,
    max_length: int,
    values: Callable[[], dict[tuple[str, int], Tensor]] | None = None,
) -> Any:
    """One of its grids as its result: mode "noising", "denoising", "zero", "mean" (with values) or "head-..."."""
    module, wrapper = submodule("patching"), patcher.model
    own, known = type(patcher), module.ActivationPatcher
    if own._patch_component is not known._patch_component or own._patch_one_head is not known._patch_one_head:
        raise Outside(f"{own.__name__} patches in its own way")
    if not isinstance(wrapper, submodule("model").RewardModel):
        raise Outside(f"a model that is a {type(wrapper).__name__}")
    rm = wrapped_model(wrapper)
    preferred, dispreferred = (
        one_text(rm, wrapper.tokenize_conversation(prompt, answer, max_length=max_length)) for answer in answers
    )
    by_head, paired = mode.startswith("head-"), mode.endswith("noising")
    adapter, modules = wrapper.adapter, wrapper.adapter.get_layers(wrapper.model)
    cells = head_cells(len(modules), wrapper.n_heads) if by_head else component_cells(len(modules))
    if by_head:
        places = [("head_out", i, adapter.get_attn_o_proj(layer)) for i, layer in enumerate(modules)]
    else:
        parts = (("attn_out", adapter.get_attn_module), ("mlp_out", adapter.get_mlp_module))
        places = [(kind, i, get(layer)) for i, layer in enumerate(modules) for kind, get in parts]
    check_places(rm, places, wrapper.n_heads if by_head else None)
    base, other = (dispreferred, preferred) if mode.endswith("denoising") else (preferred, dispreferred)
    replaced: int | slice = slice(None)  # heads behind the end of the other text are zeroed, components are left
    if paired and not by_head:
        replaced = slice(0, min(len(base[0]), len(other[0])))
    if values is not None:
        rm_patcher = patcher_of(rm)
        if isinstance(rm_patcher, SuffixPatcher) and any(fused.sandwich for _, fused in rm_patcher.engine.layers):
            raise Outside("means before the norm behind attention and MLP")
        replaced = len(base[0]) - 1
    found, theirs, rewards = patched_rewards(
        rm, base, other if paired else None, cells, replaced, None if values is None else values()
    )
    base_reward = float(found[0])
    other_reward = reward_of(rm, other[0]) if theirs is None else float(theirs[0])
    sign = -1 if mode.endswith("denoising") else 1
    original = sign * (base_reward - other_reward)
    kinds = {"attn_out": "attn", "mlp_out": "mlp", "head_out": "attn_head"}
    short = {**kinds, "head_out": "head"}
    return module.PatchingResult(
        component_names=[f"{short[k]}_L{i}" + (f"_H{unit}" if by_head else "") for k, i, unit in cells],
        component_types=[kinds[k] for k, _, _ in cells],
        layer_indices=[i for _, i, _ in cells],
        patch_effects=np.array([original - sign * (reward - other_reward) for reward in rewards[:, 0].tolist()]),
        original_differential=original,
        patching_mode=mode,
    )
