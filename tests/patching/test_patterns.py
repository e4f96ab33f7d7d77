"""Attention patterns: another text's in a head's place, and frozen ones, against transformers' own eager attention."""

from __future__ import annotations

import itertools
import random
from contextlib import ExitStack, contextmanager

import families
import models as M
import oracle
import pytest
import torch

from rmfast.reward_model import RewardModel  # before any test runs in fp64: defaults are read at the first import

FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt2", "neox"]


def model(family, dtype=torch.float64, **kw):
    made = families.model if family in families.FAMILIES and family != "gpt2" else M.decoder
    layers = {"layers": 3} if made is families.model else {"num_hidden_layers": 3}
    return made(family, **layers, attn_implementation="eager", **kw).to(dtype)


def texts(length=21, changed=(9, 10, 14)):
    clean = M.token_ids([length], 3)[0]
    return clean, [(x + 17) % 256 if t in changed else x for t, x in enumerate(clean)]


def patterns(m, ids):
    """(Hq, T, T) of each layer, as eager attention gives them beside its output."""
    found = []
    with ExitStack() as stack:
        for block in oracle.layers(m):
            names = ("self_attn", "attn", "attention")
            attention = next(part for name, part in block.named_children() if name in names)
            note = attention.register_forward_hook(lambda module, args, out: found.append(out[1][0]))
            stack.callback(note.remove)
        oracle.reward(m, ids, 0)
    return found


def heads_with(pattern, v):
    """(T, Hq, D) of a pattern (Hq, T, T) and values (T, Hkv, D)."""
    return torch.einsum("hqk,khd->qhd", pattern.to(v), v.repeat_interleave(len(pattern) // v.size(1), 1))


@pytest.mark.parametrize("family, mode", [("llama", "noising"), *((family, "denoising") for family in FAMILIES)])
def test_a_heads_pattern_is_replaced_and_its_values_are_its_own(family, mode):
    m, (clean, corrupted) = model(family), texts()
    base, other = (clean, corrupted) if mode == "noising" else (corrupted, clean)
    with oracle.everything_in_fp64():
        sweep = RewardModel(m).patch_sweep(clean, corrupted, mode=mode, sites="pattern", positions=[9, 14, [12, 20]])
        assert sweep.axes == ("layer", "position", "head") and sweep.engine == "suffix"
        theirs = patterns(m, other)
        every = list(itertools.product(*map(range, sweep.rewards.shape)))
        for layer, group, head in random.Random(0).sample(every, 6):
            positions = sweep.coords["position"][group]
            new = heads_with(theirs[layer], oracle.activation(m, base, "v", layer))[positions, head]
            truth = oracle.oracle(m, base, len(base) - 1, "head_out", layer, positions, head, new)
            assert float((sweep.rewards[layer, group, head] - truth).abs()) <= 1e-9
    assert (sweep.effect[:2].abs() > 1e-6).any()


def test_fp32_patterns_are_within_1e_5_of_the_reward_scale():
    m, (clean, corrupted) = model("llama", torch.float32), texts()
    found = RewardModel(m).patch_sweep(clean, corrupted, sites=["pattern", "z"], positions="joint")
    assert found.coords["site"] == ["pattern", "head_out"]
    with oracle.everything_in_fp64():
        exact = RewardModel(m.double()).patch_sweep(clean, corrupted, sites=["pattern", "z"], positions="joint")
    assert float((found.rewards - exact.rewards).abs().max()) <= 1e-5 * M.reward_scale(m)


@contextmanager
def frozen(m, ids):
    """Heads of every layer give what the patterns of a text make of the values that come by."""
    kept = patterns(m, ids)
    with ExitStack() as stack:
        for layer, block in enumerate(oracle.layers(m)):
            seen = []

            def values(module, args, out, seen=seen, size=block.self_attn.head_dim):
                seen[:] = [out[0].unflatten(-1, (-1, size))]

            def heads(module, args, seen=seen, layer=layer):
                return (heads_with(kept[layer], seen[0]).flatten(1)[None],)

            stack.callback(block.self_attn.v_proj.register_forward_hook(values).remove)
            stack.callback(block.self_attn.o_proj.register_forward_pre_hook(heads).remove)
        yield


@pytest.mark.parametrize(
    "family, kind",
    [("llama", "resid_pre"), ("gemma2", "resid_post"), ("qwen3", "attn_out"), ("gemma2", "head_out")],
)
def test_with_frozen_patterns_only_values_change(family, kind):
    m, (clean, corrupted) = model(family), texts()
    with oracle.everything_in_fp64():
        rm = RewardModel(m)
        sweep = rm.patch_sweep(clean, corrupted, sites=kind, positions=[9, [11, 14]], patterns="frozen")
        every = list(itertools.product(*map(range, sweep.rewards.shape)))
        for cell in random.Random(0).sample(every, min(4, len(every))):
            layer, group, head = (*cell, 0)[:3]
            positions = sweep.coords["position"][group]
            new = oracle.activation(m, clean, kind, layer)[positions, head]
            with frozen(m, corrupted):
                truth = oracle.oracle(m, corrupted, 20, kind, layer, positions, head, new)
            assert float((sweep.rewards[cell] - truth).abs()) <= 1e-9
        own = rm.patch_sweep(clean, corrupted, sites=kind, positions=[9, [11, 14]])
    assert "frozen patterns" in repr(sweep) and sweep.patterns == "frozen"
    assert not torch.allclose(own.rewards[0], sweep.rewards[0])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_patched_value_under_frozen_patterns_reaches_all_later_rows_of_its_heads(family):
    m, (clean, corrupted) = model(family), texts()
    with oracle.everything_in_fp64():
        sweep = RewardModel(m).patch_sweep(clean, corrupted, sites="v", positions=[9, [11, 14]], patterns="frozen")
        kept = patterns(m, corrupted)
        for layer, group, head in random.Random(0).sample(list(itertools.product(range(3), range(2), range(2))), 8):
            positions, block = sweep.coords["position"][group], oracle.layers(m)[layer]
            v = oracle.activation(m, corrupted, "v", layer)
            v[positions, head] = oracle.activation(m, clean, "v", layer)[positions, head]
            added = block.self_attn.o_proj(heads_with(kept[layer], v).flatten(1)).detach()
            added = added if family == "llama" else block.post_attention_layernorm(added).detach()
            with frozen(m, corrupted):
                truth = oracle.oracle(m, corrupted, 20, "attn_out", layer, range(21), 0, added)
            assert float((sweep.rewards[layer, group, head] - truth).abs()) <= 1e-9


def test_values_patched_under_frozen_patterns_differ_from_ones_own_behind_the_layer_alone():
    m, (clean, corrupted) = model("llama"), texts()
    rm = RewardModel(m)
    with oracle.everything_in_fp64():
        own, held = (
            rm.patch_sweep(clean, corrupted, sites="v", positions="joint", patterns=patterns).rewards
            for patterns in ("own", "frozen")
        )
    torch.testing.assert_close(own[2], held[2], rtol=1e-10, atol=1e-10)  # there is no pattern behind the last layer
    assert (own[0] - held[0]).abs().max() > 1e-6


def test_refusals():
    clean, corrupted = texts()
    rm = RewardModel(model("llama", torch.float32))
    with pytest.raises(ValueError, match="correspond token by token"):
        rm.patch_sweep(clean, corrupted[:-2], sites="pattern")
    with pytest.raises(ValueError, match="pattern, a place for that of another text"):
        rm.patch_sweep(clean, sites="pattern", mode="zero")
    with pytest.raises(ValueError, match="sites without pattern"):
        rm.attribution_patch(clean, corrupted, sites="pattern")
    with pytest.raises(ValueError, match='patterns="own" with sites of q'):
        rm.patch_sweep(clean, corrupted, sites="q", patterns="frozen")
    with pytest.raises(ValueError, match='patterns="own" with attribution'):
        rm.patch_sweep(clean, corrupted, patterns="frozen", screen="atp", top=2)
    with pytest.raises(ValueError, match="sites to be different"):
        rm.patch_sweep(clean, corrupted, sites=["z", "head_out"])
    encoder = RewardModel(M.encoder("Bert"))
    with pytest.raises(ValueError, match="sites without pattern"):
        encoder.patch_sweep(clean, corrupted, sites="pattern")
    with pytest.raises(ValueError, match="runs by hooks"):
        encoder.patch_sweep(clean, corrupted, patterns="frozen")
