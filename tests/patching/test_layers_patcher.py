"""LayersPatcher, judged by plain hooks on the unmodified model, one edit a forward (tests/oracle.py)."""

from __future__ import annotations

import threading

import models as M
import numpy as np
import oracle as O
import pytest
import torch
from edited import IDS, MAKERS, OTHER, READ, bound, expected, families, few, grid, noisy, run, scale, text, traces

from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.sites import KINDS, Edits


@families
def test_an_edit_gives_what_plain_hooks_give(family, dtype):
    model = MAKERS[family]().to(dtype)
    patcher, kinds = LayersPatcher(bound(model)), O.kinds(model)
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set())
        values = noisy(patcher.record(text(OTHER), READ, set(kinds)))
        edits = grid(patcher, kinds)
        got = run(patcher, base, edits, values)
    want = expected(model, edits, values)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    error = (got.double() - want.double()).abs() / want.double().abs().clamp(min=scale(model))
    assert float(error.max()) <= tolerance, [KINDS[k] for k in edits.kind[error.amax(1).numpy() > tolerance]]
    assert len({round(float(r[0]), 4) for r in want}) > len(edits) // 4  # the edits do something


def test_beyond_the_limit_of_rotary_frequencies_too(all_fp64):
    """LongRoPE and dynamic NTK choose frequencies by the length, here above their limits."""
    ids = M.token_ids([30])[0]
    for family in ("phi3-longrope", "llama-dynamic"):
        model = M.decoder(family).double()
        patcher = LayersPatcher(bound(model))
        groups = np.zeros((1, 30), bool)
        groups[0, 20] = True
        edits = Edits(np.array([0], np.int8), np.array([1]), np.array([0]), np.array([0]), groups)
        with patcher.binding.session():
            base = patcher.record(text(ids), 29, set())
            values = noisy(base)
            got = run(patcher, base, edits, values)[0]
        want = O.oracle(model, ids, 29, "resid_pre", 1, [20], 0, values("resid_pre", 1)[[20], 0])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "bert-tokens", "electra"])
def test_token_types_are_the_texts_own(family, all_fp64):
    model, types = MAKERS[family]().double(), [0] * 5 + [1] * 6
    patcher = LayersPatcher(bound(model))
    with patcher.binding.session():
        base = patcher.record(text(IDS, types), READ, {"k"})
        edits, values = grid(patcher, ["k"]), noisy(base)
        got = run(patcher, base, edits, values)
    torch.testing.assert_close(base.reward, O.reward(model, IDS, READ, types), rtol=0, atol=1e-10)
    torch.testing.assert_close(got, expected(model, edits, values, types), rtol=0, atol=1e-10)
    assert (base.reward - O.reward(model, IDS, READ)).abs().max() > 1e-3


def test_a_models_own_activations_change_nothing():
    model = M.decoder("gemma2").double()
    patcher = LayersPatcher(bound(model))
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        got = run(patcher, base, grid(patcher, list(KINDS)), base.activations)
    torch.testing.assert_close(got, base.reward.expand_as(got), rtol=0, atol=1e-12)


def test_the_size_of_batches_changes_nothing():
    model = M.decoder("llama").double()
    patcher = LayersPatcher(bound(model))
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        edits, values = grid(patcher, list(KINDS)), noisy(base)
        one, all_at_once = (run(patcher, base, edits, values, n) for n in (1, 10**6))
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-12)


def test_batches_that_are_done_are_left_out():
    patcher, seen = LayersPatcher(bound(M.decoder("llama"))), []
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        edits, values = grid(patcher, ["q"]), noisy(base)
        want, skip = run(patcher, base, edits, values), np.ones(len(edits), bool)
        skip[4] = False
        patcher.rewards(base, edits, values, 33, lambda *some: seen.append(some), skip)
    [(indices, rewards)] = seen
    assert indices.tolist() == [3, 4, 5] and torch.equal(rewards, want[3:])


def test_layers_below_the_edit_are_not_run():
    model, calls = M.decoder("llama"), []
    patcher = LayersPatcher(bound(model))
    groups = np.ones((1, len(IDS)), bool)
    for kind, layer, ran in (("resid_post", 0, [1]), ("attn_out", 1, [1]), ("resid_post", 1, []), ("q", 0, [0, 1])):
        edits = Edits(*(np.array([i]) for i in (KINDS.index(kind), layer, 0, 0)), groups)
        with patcher.binding.session():
            base = patcher.record(text(IDS), READ, {kind})
            handles = [
                block.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
                for i, block in enumerate(model.model.layers)
            ]
            run(patcher, base, edits, base.activations)
        for handle in handles:
            handle.remove()
        assert calls == ran, kind
        calls.clear()


def test_values_of_another_shape_are_refused():
    patcher = LayersPatcher(bound(M.decoder()))
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set())
        with pytest.raises(ValueError, match=r"values of head_out in layer 0 .* = \(11, 4, 12\), got \(11, 1, 48\)"):
            run(patcher, base, grid(patcher, ["head_out"]), lambda kind, layer: torch.zeros(11, 1, 48))


def test_a_record_says_what_it_holds():
    patcher = LayersPatcher(bound(M.decoder()))
    with patcher.binding.session():
        record = patcher.record(text(IDS), READ, {"q"})
    with pytest.raises(ValueError, match=r"recorded \(q, resid_post, resid_pre\), got v of layer 0"):
        record.activations("v", 0)


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch):
    patcher, sizes = LayersPatcher(bound(M.decoder("llama").double())), []
    edited = patcher._edited

    def small(base, edits, new):
        sizes.append(len(edits))
        if len(edits) > 2:
            raise torch.OutOfMemoryError("no more")
        return edited(base, edits, new)

    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        edits, values = grid(patcher, ["resid_mid", "v"]), noisy(base)
        want = run(patcher, base, edits, values)
        monkeypatch.setattr(patcher, "_edited", small)
        got = run(patcher, base, edits, values, 88)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert sizes[:3] == [6, 3, 1] and max(sizes[2:]) == 1


@few
def test_nothing_is_left_in_the_model(family):
    model = MAKERS[family]().train()
    before = traces(model)
    patcher, kinds = LayersPatcher(bound(model)), O.kinds(model)
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(kinds))
        run(patcher, base, grid(patcher, kinds), base.activations)
    patcher.gradients(text(IDS), READ, set(kinds), metric=torch.sum)
    assert traces(model) == before
    assert all(module.training for module in model.modules())


def test_nothing_is_left_in_the_model_by_an_error():
    model = M.decoder("llama")
    before = traces(model)
    patcher = LayersPatcher(bound(model))

    def fail(*args):
        raise KeyError("mine")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with patcher.binding.session(), pytest.raises(KeyError, match="mine"):
        patcher.record(text(IDS), READ, set(KINDS))
    with pytest.raises(KeyError, match="mine"):
        patcher.gradients(text(IDS), READ, {"q"})
    handle.remove()
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        handle = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(KeyError, match="mine"):
            run(patcher, base, grid(patcher, list(KINDS)), base.activations)
        handle.remove()
    with pytest.raises(KeyError, match="mine"):
        patcher.gradients(text(IDS), READ, {"q"}, metric=fail)
    assert traces(model) == before


def steer_output(model):
    return model.model.layers[0].register_forward_hook(lambda module, args, out: out + 1.5)


def steer_input_in_place(model):
    return model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].add_(0.5), None)[1])


def same_tensor_from_a_projection(model):
    fixed = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(0)).double()
    projection = model.model.layers[1].self_attn.o_proj
    return projection.register_forward_hook(lambda module, args, out: out * 0 + fixed)


def scaled_norm_input(model):
    norm = model.model.layers[1].post_attention_layernorm
    return norm.register_forward_pre_hook(lambda module, args: (args[0] * torch.linspace(1, 2, 48).double(),))


def constant_output(model):
    kept = torch.randn(len(IDS), 48, generator=torch.Generator().manual_seed(0)).double()
    return model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: kept.expand_as(out))


@pytest.mark.parametrize(
    "hook", [steer_output, same_tensor_from_a_projection, scaled_norm_input, constant_output, steer_input_in_place]
)
def test_hooks_of_the_users_take_part_and_stay(hook, all_fp64):
    model = M.decoder("llama").double()
    binding = bound(model)
    patcher = LayersPatcher(binding)
    handle = hook(model)
    hooked = traces(model)
    with binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        edits, values = grid(patcher, list(KINDS)), noisy(patcher.record(text(OTHER), READ, set(KINDS)))
        got = run(patcher, base, edits, values)
        again = patcher.record(text(IDS), READ, set())
    assert traces(model) == hooked
    torch.testing.assert_close(base.reward, O.reward(model, IDS, READ), rtol=0, atol=1e-10)
    torch.testing.assert_close(again.reward, base.reward, rtol=0, atol=0)
    if hook is not steer_input_in_place:  # the oracle's own hook there comes after it, as ours does
        torch.testing.assert_close(got, expected(model, edits, values), rtol=0, atol=1e-10)
    handle.remove()


def test_other_threads_runs_are_left_alone(all_fp64):
    model = M.decoder("llama").double()
    patcher, want = LayersPatcher(bound(model)), O.reward(model, IDS, READ)
    got = []
    with patcher.points[1]["attn_out"].tapped(lambda x: torch.zeros_like(x)):
        assert not torch.allclose(O.reward(model, IDS, READ), want)
        thread = threading.Thread(target=lambda: got.append(O.reward(model, IDS, READ)))
        thread.start()
        thread.join()
    assert torch.equal(got[0], want)
