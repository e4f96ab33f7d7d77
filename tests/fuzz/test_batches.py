"""Random ragged batches: each text's bits are those it has alone; sweeps, near transformers, are what hooks give."""

from __future__ import annotations

import functools
import random

import models as M
import oracle
import torch
from fuzzing import fuzz, tried, worst
from hypothesis import strategies as st

import rmfast
from rmfast.patching.sites import KINDS

FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEXT = st.lists(st.integers(3, 255), min_size=1, max_size=12)


@functools.cache
def reward_model(family: str, dtype: torch.dtype) -> rmfast.RewardModel:
    return rmfast.RewardModel(M.decoder(family, num_hidden_layers=3).to(dtype))


@st.composite
def batches(draw: st.DrawFn) -> list[list[int]]:
    """Up to 12 texts, most of which share a beginning with others."""
    seed = draw(st.integers(0, 2**32))
    prompts = [[random.Random(seed + i).randrange(3, 256) for _ in range(90)] for i in range(2)]
    some = st.tuples(st.sampled_from(prompts), st.integers(0, 90), TEXT)
    return [prompt[:shared] + own for prompt, shared, own in draw(st.lists(some, min_size=1, max_size=12))]


@fuzz(
    30,
    family=st.sampled_from(FAMILIES),
    dtype=st.sampled_from(DTYPES),
    texts=batches(),
    budget=st.sampled_from([None, 16, 64, 257]),
)
def test_no_batch_moves_a_bit(family, dtype, texts, budget):
    rm = reward_model(family, dtype)
    assert rm.moves() is None
    rewards = rm.score(texts, batch_tokens=budget)
    values = rm.token_values(texts, batch_tokens=budget)
    for text, reward, value in zip(texts, rewards, values, strict=True):
        assert torch.equal(rm.score([text])[0], reward), text
        assert torch.equal(rm.token_values([text])[0], value), text
    tried(f"texts in {str(dtype)[6:]}", len(texts))
    if dtype == torch.float32:
        with torch.inference_mode():
            theirs = torch.stack([rm.model(torch.tensor([text])).logits[0, 0] for text in texts])
        error = float((rewards - theirs).abs().max()) / M.reward_scale(rm.model)
        worst("reward against transformers, fp32, in reward scales", error)
        assert error < 1e-5


@fuzz(
    30,
    family=st.sampled_from(FAMILIES),
    kind=st.sampled_from([kind for kind in KINDS if kind != "mlp_neuron"]),
    shared=st.lists(st.integers(3, 255), max_size=20),
    own=st.lists(st.tuples(st.integers(3, 255), st.integers(3, 255)), min_size=1, max_size=20).filter(
        lambda own: any(a != b for a, b in own)
    ),
    seed=st.integers(0, 2**32),
)
def test_a_cell_of_a_sweep_is_what_a_hook_gives(family, kind, shared, own, seed):
    rm, rng = reward_model(family, torch.float32), random.Random(seed)
    clean, corrupted = ([*shared, *(pair[side] for pair in own)] for side in (0, 1))
    sweep = rm.patch_sweep(clean, corrupted, sites=kind)
    cell = tuple(map(rng.randrange, sweep.rewards.shape))
    at = {axis: sweep.coords[axis][i] for axis, i in zip(sweep.axes, cell, strict=True)}
    unit = next((at[axis] for axis in ("head", "unit") if axis in at), 0)
    new = oracle.activation(rm.model, clean, kind, at["layer"])[at["position"], unit]
    want = oracle.oracle(rm.model, corrupted, len(corrupted) - 1, kind, at["layer"], at["position"], unit, new)
    error = abs(float(sweep.rewards[cell] - want)) / M.reward_scale(rm.model)
    worst("cell of a sweep against a hook, fp32, in reward scales", error)
    assert error < 1e-5, (kind, at)
