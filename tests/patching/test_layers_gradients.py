"""LayersPatcher's gradients, judged by finite differences of rewards under plain hooks (tests/oracle.py)."""

from __future__ import annotations

import models as M
import oracle as O
import pytest
import torch
from edited import IDS, MAKERS, READ, bound, families, few, gradients, grid, noisy, run, text

from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.sites import KINDS


@families
def test_gradients_are_finite_differences(family, all_fp64):
    model = MAKERS[family]().double()
    binding, kinds = bound(model), O.kinds(model)
    record, gradient = gradients(binding, set(kinds), metric=lambda r: r[0])
    for kind in kinds:
        for layer in range(len(O.layers(model))):
            x, grad = record.activations(kind, layer), gradient(kind, layer)
            assert grad.shape == x.shape
            unit, positions = x.size(1) - 1, [0, 4, READ]
            step = torch.randn(3, x.size(2), dtype=x.dtype, generator=torch.Generator().manual_seed(layer))
            ends = [
                O.oracle(model, IDS, READ, kind, layer, positions, unit, x[positions, unit] + eps * step)[0]
                for eps in (1e-5, -1e-5)
            ]
            slope = (grad[positions, unit] * step).sum()
            torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-9, msg=f"{kind} {layer}")


@few
def test_the_gradient_run_is_recorded_like_any_other(family):
    model = MAKERS[family]()
    patcher, kinds = LayersPatcher(bound(model)), set(O.kinds(model))
    got, _ = patcher.gradients(text(IDS), READ, kinds, metric=torch.sum)
    with patcher.binding.session():
        want = patcher.record(text(IDS), READ, kinds)
        assert not got.reward.requires_grad
        torch.testing.assert_close(got.reward, want.reward)
        for kind in kinds:
            torch.testing.assert_close(got.activations(kind, 1), want.activations(kind, 1))
        edits = grid(patcher, sorted(kinds))
        torch.testing.assert_close(*(run(patcher, base, edits, noisy(want)) for base in (got, want)))


def test_several_rewards_have_a_gradient_each():
    binding = bound(M.decoder("llama", labels=3))
    _, every = gradients(binding, {"resid_mid", "k"})
    for label in range(3):
        _, one = gradients(binding, {"k", "resid_mid"}, metric=lambda r, label=label: r[label])
        for kind in ("resid_mid", "k"):
            torch.testing.assert_close(every(kind, 0)[label], one(kind, 0))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_may_be_eager_or_sdpa(implementation):
    model = M.decoder("llama").double()
    _, want = gradients(bound(model), {"q"})
    model.set_attn_implementation(implementation)
    _, got = gradients(bound(model), {"q"})
    torch.testing.assert_close(got("q", 0), want("q", 0), rtol=0, atol=1e-6)


def test_parameters_get_no_gradients_and_keep_what_they_have():
    model, touched = M.decoder("llama"), []
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    model.score.weight.requires_grad = False
    flags = [p.requires_grad for p in model.parameters()]
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda grad: touched.append(grad))
    gradients(bound(model), set(KINDS))
    assert not touched
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert sum(p.grad is not None for p in model.parameters()) == 1


@few
def test_frozen_models_have_the_same_gradients_inside_of_any_mode(family):
    model = MAKERS[family]()
    kinds = set(O.kinds(model))
    patcher = LayersPatcher(bound(model))
    _, want = patcher.gradients(text(IDS), READ, kinds, metric=torch.sum)
    model.requires_grad_(False)
    with torch.inference_mode():
        _, got = patcher.gradients(text(IDS), READ, kinds, metric=torch.sum)
        assert torch.is_inference_mode_enabled()
    for kind in kinds:
        torch.testing.assert_close(got(kind, 0), want(kind, 0))


@pytest.mark.parametrize("metric", [lambda r: r.repeat(2), lambda r: 1.0, lambda r: r.detach()[0]])
def test_a_metric_that_is_no_number_of_the_rewards_is_refused(metric):
    with pytest.raises(ValueError, match="Expected metric to return one number that depends on the rewards"):
        gradients(bound(M.decoder()), {"q"}, metric)


def test_gradients_that_were_not_asked_for_are_refused():
    _, gradient = gradients(bound(M.decoder()), {"q"})
    with pytest.raises(ValueError, match=r"asked for before \(q\), got v of layer 1"):
        gradient("v", 1)
