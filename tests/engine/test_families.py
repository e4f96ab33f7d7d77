"""Every dense family: fused, and right: scores, bits, lens, attribution and sweeps against the unmodified model."""

from __future__ import annotations

import contextlib
import copy

import families as F
import models as M
import oracle as O
import pytest
import torch

from rmfast import RewardModel

FAMILIES = [name for name in F.FAMILIES if name != "olmo-clipped"]
PROMPT = M.token_ids([20], 9)[0]
TEXTS = [*M.token_ids([5, 40, 3, 17, 1]), *(PROMPT + text for text in M.token_ids([4, 9, 2], 5)), PROMPT]
TEXT = TEXTS[6]
FINE = ("embedding", "head_out", "mlp_neuron")


def final_norm(model):
    body = getattr(model.base_model, "decoder", model.base_model)
    return next(
        getattr(body, name) for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm") if hasattr(body, name)
    )


def gain(norm):
    weight = getattr(norm, "weight", None)
    return 1 if weight is None else weight.detach() + ("1P" in type(norm).__name__)


def size(model) -> float:
    """‖γ⊙w‖, the largest of the heads."""
    return float((model.score.weight.detach() * gain(final_norm(model))).norm(dim=-1).max())


def exact(dtype):
    return O.everything_in_fp64() if dtype == torch.float64 else contextlib.nullcontext()


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_values_are_those_of_each_text_alone(family, dtype, rounding):
    model = F.model(family, labels=2).to(dtype)
    with exact(dtype):
        want = torch.stack([O.reward(model, ids, len(ids) - 1) for ids in TEXTS])
        every = torch.stack([O.reward(model, TEXT, at) for at in range(len(TEXT))])
        rm = RewardModel(model)
        assert rm.explain().startswith("engine: packed, fused layers"), rm.explain()
        for budget in (None, 16):
            got = rm.score(TEXTS, batch_tokens=budget, engine="packed")
            assert float((got - want).abs().max()) <= rounding * max(size(model), float(want.abs().max()))
        values = rm.token_values([TEXT], engine="packed")[0]
        assert float((values - every).abs().max()) <= rounding * max(size(model), float(every.abs().max()))


def assert_rounded(got, truth, theirs, size: float) -> None:
    """Rewards of bf16 arithmetic: in the mean about as near to the truth as transformers', and each within 4 eps of the
    reward scale.

    Two layers round their stream, or what they add to it, about 16 times, by half an eps each: 2 eps where signs are
    random, and 8 if all were alike. A fixed bound, since the largest of a few errors goes by chance, in theirs too.
    """
    error = (got - truth).abs()
    assert float(error.mean()) <= 1.25 * float((theirs - truth).abs().mean())
    assert float(error.max()) <= 4 * torch.finfo(torch.bfloat16).eps * size


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_rewards_have_one_set_of_bits_about_as_near_to_the_truth_as_in_transformers(family):
    model = F.model(family, labels=2)
    half = copy.deepcopy(model).to(torch.bfloat16)
    truth = torch.stack([M.alone(copy.deepcopy(half).float(), ids) for ids in TEXTS])
    theirs = torch.stack([M.alone(half, ids) for ids in TEXTS])
    for compute in ("native", "fp32"):
        rm = RewardModel(half, compute=compute)
        assert "packed, fused" in rm.explain() and "bits: the same in any batch" in rm.explain(), rm.explain()
        got = rm.score(TEXTS)
        assert torch.equal(got, torch.cat([rm.score([ids]) for ids in TEXTS]))
        if compute == "fp32":
            assert float((got - truth).abs().max()) <= 1e-5 * max(size(half), float(truth.abs().max()))
        else:
            assert_rounded(got, truth, theirs, size(half))


@pytest.mark.parametrize("wrong", range(len(TEXTS)))
@pytest.mark.parametrize("family", ["opt", "phi", "olmo3", "nemotron"])
def test_one_wrong_text_is_more_than_rounding(family, wrong):
    half = F.model(family, labels=2).to(torch.bfloat16)
    truth = torch.stack([M.alone(copy.deepcopy(half).float(), ids) for ids in TEXTS])
    theirs, got = torch.stack([M.alone(half, ids) for ids in TEXTS]), RewardModel(half, compute="native").score(TEXTS)
    assert_rounded(got, truth, theirs, size(half))
    got[wrong] = truth[wrong - 1]  # another text's
    with pytest.raises(AssertionError):
        assert_rounded(got, truth, got, size(half))  # by its largest error alone


def test_bf16_rewards_are_nearer_to_the_truth_than_in_transformers():
    """A few texts' errors go by chance: judged over the families."""
    shares, texts = [], M.token_ids([5, 40, 17, 25, 60, 12] * 2)
    for family in FAMILIES:
        half = F.model(family, labels=2).to(torch.bfloat16)
        rm, wide = RewardModel(half, compute="native"), copy.deepcopy(half).float()
        assert rm.packed_engine().wide
        truth, theirs = (torch.stack([M.alone(model, ids) for ids in texts]) for model in (wide, half))
        shares.append(float((rm.score(texts) - truth).abs().mean() / (theirs - truth).abs().mean()))
    assert sum(shares) / len(shares) <= 0.75, shares


@pytest.mark.parametrize("family", FAMILIES)
def test_lens_and_attribution_are_those_of_plain_hooks(family):
    model = F.model(family, labels=2, layers=3).double()
    with O.everything_in_fp64():
        rm = RewardModel(model)
        streams = [O.activation(model, TEXT, "resid_pre", layer)[-1, 0] for layer in range(3)]
        norm = final_norm(model)
        with torch.no_grad():
            read = [model.score(norm(x[None]))[0] for x in streams]
        want = torch.stack([*read, O.reward(model, TEXT, len(TEXT) - 1)])
        torch.testing.assert_close(rm.lens([TEXT]).rewards[0], want, rtol=1e-9, atol=1e-9 * size(model))

        parts, units = rm.attribute(TEXT), rm.attribute(TEXT, components=FINE)
        for found in (parts, units):
            torch.testing.assert_close(found.total, want[-1], rtol=1e-9, atol=1e-9 * size(model))
        last = O.activation(model, TEXT, "resid_post", 2)[-1, 0]
        centred = last - last.mean() if "LayerNorm" in type(norm).__name__ else last
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-5))
        direction = model.score.weight.detach() * gain(norm) / (centred.square().mean() + eps).sqrt()
        direction = direction - direction.mean(-1, keepdim=True) if "LayerNorm" in type(norm).__name__ else direction
        for kind in ("attn_out", "mlp_out"):
            added = torch.stack([O.activation(model, TEXT, kind, layer)[-1, 0] for layer in range(3)])
            torch.testing.assert_close(parts.of(kind), added @ direction.T, rtol=1e-8, atol=1e-9 * size(model))
            torch.testing.assert_close(units.of(kind), parts.of(kind), rtol=1e-8, atol=1e-9 * size(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_of_sweeps_are_what_hooks_on_the_model_give(family):
    model = F.model(family).double()
    clean, corrupted = M.token_ids([9, 9], 3)
    corrupted = clean[:2] + corrupted[2:]
    with O.everything_in_fp64():
        rm = RewardModel(model)
        for kind in O.kinds(model):
            sweep = rm.patch_sweep(
                clean, corrupted, sites=kind, positions=[4, 8], **({"neurons": [7]} if kind == "mlp_neuron" else {})
            )
            assert sweep.engine == "suffix"
            for layer in range(2):
                values = O.activation(model, clean, kind, layer)
                for i, position in enumerate((4, 8)):
                    unit = 7 if kind == "mlp_neuron" else values.size(1) - 1
                    want = O.oracle(model, corrupted, 8, kind, layer, [position], unit, values[[position], unit])
                    got = sweep.rewards[layer, i].reshape(-1)[-1:]
                    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9 * size(model), msg=f"{kind} {layer} {i}")


def test_parallel_layers_have_no_stream_between_attention_and_mlp():
    rm = RewardModel(F.model("falcon-7b"))
    with pytest.raises(ValueError, match=r"layer 0 .*to have resid_mid"):
        rm.patch_sweep([1, 2, 3], [1, 4, 3], sites="resid_mid")


def test_norms_that_give_the_same_numbers_are_told_apart():
    """As just initialised both norms of a parallel layer are one function; they are trained apart."""
    model = F.model("falcon-40b")
    for layer in model.transformer.h:
        layer.ln_mlp.load_state_dict(layer.ln_attn.state_dict())
    rm = RewardModel(model)
    rm.score(TEXTS)
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.ln_mlp.weight.mul_(3)
    want = torch.stack([M.alone(model, ids)[0] for ids in TEXTS])
    torch.testing.assert_close(rm.score(TEXTS), want, rtol=1e-5, atol=1e-5 * size(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_another_formula_that_keeps_its_heads_to_itself_is_not_taken_apart(dtype):
    """With weights as just initialised, whose scores tell no tokens apart."""
    from transformers.models.falcon import modeling_falcon

    class Backwards(modeling_falcon.FalconAttention):
        def forward(self, *args, position_embeddings=None, **kwargs):
            cos, sin = position_embeddings
            return super().forward(*args, position_embeddings=(cos, -sin), **kwargs)

    model = F.model("falcon-7b")
    torch.manual_seed(0)
    model = type(model)(model.config)
    for layer in model.transformer.h:
        layer.self_attention.__class__ = Backwards
    rm = RewardModel(model.to(dtype).eval())
    assert "engine: padded" in rm.explain() and "Backwards is not transformers' own" in rm.explain()
