"""Mixtures of experts, latent attention, attention sinks and ALiBi: packed, right in every workload, the same bits."""

from __future__ import annotations

import models as M
import oracle as O
import pytest
import torch
from torch import nn

from rmfast import RewardModel
from rmfast.engine import experts
from rmfast.engine.functions import Alike

FUSED = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss"]
PACKED = [*M.MIXTURES, "bloom", "mpt"]
packed = pytest.mark.parametrize("family", PACKED)
# In bf16 itself Bloom is not packed: it rounds its biases.
arithmetics = pytest.mark.parametrize(
    "family, compute",
    [
        (family, compute)
        for family in PACKED
        for compute in ("native", "fp32")
        if (family, compute) != ("bloom", "native")
    ],
)
TEXTS = M.token_ids([5, 60, 3, 24, 1, 41], seed=1)
TEXTS += [[*TEXTS[1][:30], 7, 8], [*TEXTS[1][:30], 9]]


def made(family, dtype=torch.float32, **kw):
    model = M.decoder(family, **kw).to(dtype)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation") and family in M.MIXTURES:
        model.set_experts_implementation("eager")  # torch's grouped product has no fp64
    return model


def layers(model) -> nn.ModuleList:
    return next(module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))


def final_norm(model) -> nn.Module:
    return next(
        getattr(model.base_model, name) for name in ("norm", "ln_f", "norm_f") if hasattr(model.base_model, name)
    )


def scale(model) -> float:
    return float((model.score.weight * final_norm(model).weight).norm(dim=-1).max().detach())


@packed
def test_scores_and_values_are_those_of_each_text_alone(family):
    model = made(family, labels=2)
    rm = RewardModel(model)
    assert rm.packed_engine().mode == ("fused" if family in FUSED else "modules")
    want = torch.stack([M.alone(model, ids) for ids in TEXTS])
    for budget in (None, 40):
        M.assert_rewards(rm.score(TEXTS, batch_tokens=budget, engine="packed"), want, scale(model))
    for ids, values in zip(TEXTS[:4], rm.token_values(TEXTS[:4], engine="packed")):
        want = torch.stack([M.alone(model, ids[: i + 1]) for i in range(len(ids))][-3:])
        M.assert_rewards(values[-3:], want, scale(model))


@packed
def test_scores_in_fp64(family):
    with O.everything_in_fp64(), torch.no_grad():
        model = made(family, torch.float64)
        got = RewardModel(model).score(TEXTS, engine="packed")
        want = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in TEXTS])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@arithmetics
def test_bf16_is_as_near_to_the_truth_as_in_transformers(family, compute):
    model = made(family, torch.bfloat16)
    truth = M.own(made(family).bfloat16().float(), TEXTS)
    own, got = M.own(model, TEXTS), RewardModel(model, compute=compute).score(TEXTS, engine="packed")
    assert float((got - truth).abs().max()) <= 2 * float((own - truth).abs().max())


@pytest.mark.parametrize("family, router", [("mixtral", "gate"), ("gpt-oss", "router")])
def test_bf16_runs_differ_by_more_than_rounding_only_where_a_router_chose_by_rounding(family, router, monkeypatch):
    model = made(family, torch.bfloat16)
    routers = [layer.mlp.get_submodule(router) for layer in layers(model)]
    rm = RewardModel(model, compute="native")
    texts, seen = M.token_ids([60, 90, 41, 50] * 8), []
    own = type(routers[0]).forward

    def recorded(self, x):
        out = own(self, x)
        bias = getattr(self, "bias", None)
        exact = x.reshape(-1, x.size(-1)).double() @ self.weight.double().T + (0 if bias is None else bias)
        seen.append((out[2].reshape(len(exact), -1).sort(-1).values, exact))
        return out

    monkeypatch.setattr(type(routers[0]), "forward", recorded)
    alike, choices = [], 0
    for ids in texts:
        values, chosen, logits = [], [], []
        for engine in ("packed", "padded"):
            seen.clear()
            values.append(rm.token_values([ids], engine=engine)[0].flatten())
            run = seen[-len(routers) :]  # behind the probe's
            chosen.append(torch.stack([index[: len(ids)] for index, _ in run]))  # (layers, T, k)
            logits.append(torch.stack([exact[: len(ids)] for _, exact in run]))
        flipped = (chosen[0] != chosen[1]).any(-1)
        # Tokens behind one that took another way read its K and V in the next layer.
        behind = torch.nn.functional.pad(flipped.cumsum(1).clamp(max=1).cumsum(0)[:-1] > 0, (0, 0, 1, 0))
        ranked = logits[1].sort(-1, descending=True).values
        k = chosen[0].size(-1)
        margin, moved = ranked[..., k - 1] - ranked[..., k], (logits[0] - logits[1]).abs().amax(-1)
        first = flipped & ~behind & ~torch.nn.functional.pad(flipped.cumsum(0)[:-1] > 0, (0, 0, 1, 0))
        assert (margin[first] <= 2 * moved[first] + 0.01 * ranked.abs().max()).all()
        assert float(moved[~behind & ~flipped].max()) <= 0.02 * float(ranked.abs().max())
        alike.append((values[0] - values[1]).abs()[~(flipped | behind).any(0)])
        choices += flipped.numel()
    assert sum(map(len, alike)) > 0.7 * choices / len(routers)
    assert float(torch.cat(alike).max()) <= 0.04 * scale(model)


@arithmetics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_batch_moves_a_bit(family, dtype, compute):
    """Routing is a token's own; how many tokens share an expert changes nothing."""
    rm = RewardModel(made(family, dtype, labels=3), invariant=True, compute=compute)
    alone = torch.cat([rm.score([ids]) for ids in TEXTS])
    for budget in (None, 40):
        assert torch.equal(rm.score(TEXTS, batch_tokens=budget), alone)
    values = [rm.token_values([ids])[0] for ids in TEXTS[:3]]
    assert all(map(torch.equal, rm.token_values(TEXTS[:3]), values))


@packed
def test_a_lens_reads_every_layer_as_transformers_gives_it(family):
    model = made(family)
    got = RewardModel(model).lens(TEXTS[:4])
    for i, ids in enumerate(TEXTS[:4]):
        with torch.no_grad():
            *states, _ = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            want = torch.stack([model.score(final_norm(model)(x[0, -1])) for x in states])[:, 0]
        M.assert_rewards(got.rewards[i].reshape(-1)[:-1], want, scale(model))
        M.assert_rewards(got.rewards[i].reshape(-1)[-1:], M.alone(model, ids), scale(model))


@packed
def test_attributions_add_up_layer_by_layer(family):
    model = made(family)
    rm = RewardModel(model)
    found, lens = rm.attribute(TEXTS[1]), rm.lens(TEXTS[1:2], norm="frozen").rewards[0].reshape(-1)
    limit = 2e-5 * max(scale(model), float(lens.abs().max()))
    torch.testing.assert_close(found.total, rm.score(TEXTS[1:2])[0], rtol=0, atol=limit)
    added = (found.of("attn_out") + found.of("mlp_out")).reshape(-1)
    torch.testing.assert_close(added, lens.diff().to(added.dtype), rtol=0, atol=limit)


CLEAN = [3, 4, 5, 6, 7, 8, 9]
CORRUPTED = [3, 4, 50, 6, 70, 8, 9]


def hooked(model, module, at, ids, use):
    """The model's reward while `use` is given, and may change in place, a module's tensor."""

    def before(module, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        use(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def after(module, args, out):
        use(out[0] if isinstance(out, tuple) else out)

    if at == "in":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        return M.alone(model, ids)
    finally:
        handle.remove()


def check_sweep(model, kind, at, part, positions):
    got = RewardModel(model).patch_sweep(CLEAN, CORRUPTED, sites=kind).rewards
    for index, layer in enumerate(layers(model)):
        module, seen = layer.get_submodule(part), []
        hooked(model, module, at, CLEAN, lambda x, seen=seen: seen.append(x.clone()))
        for t in positions:
            want = hooked(model, module, at, CORRUPTED, lambda x, t=t, old=seen[0]: x[:, t].copy_(old[:, t]))
            M.assert_rewards(got[index, t].reshape(1), want, scale(model))


@packed
def test_a_sweep_patches_what_a_hook_would(family):
    check_sweep(made(family), "resid_pre", "in", "", range(len(CLEAN)))


@pytest.mark.parametrize("family", [*FUSED, "deepseek-v2", "deepseek-v3"])
@pytest.mark.parametrize("kind, part", [("attn_out", "self_attn"), ("mlp_out", "mlp")])
def test_a_sweep_patches_parts_of_layers(family, kind, part):
    check_sweep(made(family), kind, "out", part, (2, 6))


PARTS = {
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("attn.out_proj", "ffn.down_proj"),
}


@pytest.mark.parametrize("family", PARTS)
def test_a_sweep_patches_parts_of_layers_that_add_their_stream_themselves(family):
    attention, mlp = PARTS[family]
    model = made(family)
    check_sweep(model, "attn_out", "out", attention, (2, 6))
    check_sweep(model, "mlp_out", "out", mlp, (2, 6))


def test_cells_of_a_sweep_keep_their_bits():
    rm = RewardModel(made("gpt-oss"), invariant=True)
    whole = rm.patch_sweep(CLEAN, CORRUPTED, sites="attn_out").rewards
    for position in (2, 6):
        some = rm.patch_sweep(CLEAN, CORRUPTED, sites="attn_out", positions=[position]).rewards
        assert torch.equal(some[:, 0], whole[:, position])


def test_sinks_are_looked_up_at_each_run():
    model = made("gpt-oss")
    rm = RewardModel(model)
    before = rm.score(TEXTS)
    with torch.no_grad():
        layers(model)[1].self_attn.sinks = nn.Parameter(layers(model)[1].self_attn.sinks + 3)
    after = rm.score(TEXTS, engine="packed")
    assert not torch.allclose(before, after)
    M.assert_rewards(after, M.own(model, TEXTS), scale(model))


def test_experts_written_in_another_way_promise_no_bits(monkeypatch):
    monkeypatch.setattr(experts, "_FLAGS", ("has_gate", "a flag of another version"))
    rm = RewardModel(made("mixtral"))
    assert rm.moves() == "how MixtralExperts multiplies by its experts depends on the batch"
    M.assert_rewards(rm.score(TEXTS), M.own(rm.binding.root, TEXTS), scale(rm.binding.root))


def test_a_list_of_experts_promises_no_bits():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    assert experts.unknown_experts(nn.Sequential(Mixed())) == "Mixed"
    assert experts.unknown_experts(M.decoder("llama")) is None


def test_far_biases_that_are_no_line_are_refused_and_scored_right_in_padded_batches():
    """Falcon rounds them to bfloat16, from position 257 on."""
    model = made("falcon-alibi", max_position_embeddings=600)
    rm, texts = RewardModel(model), M.token_ids([300, 40])
    assert "are not a slope times the position" in rm.explain()
    for compute in ("native", "fp32"):
        M.assert_rewards(RewardModel(model, compute=compute).score(texts), M.own(model, texts), scale(model))


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_far_biases_in_bf16_are_the_models_own(family):
    """Bloom rounds them to the dtype that it runs in; MPT adds them in fp32."""
    longer = {"max_position_embeddings": 2500, **({"max_seq_len": 2500} if family == "mpt" else {})}
    model, text = made(family, torch.bfloat16, **longer), M.token_ids([2200])
    want = M.own(model, text)
    rm = RewardModel(model, compute="native")
    refused = "padded (not packed: the biases that BloomAttention is given are not a slope times the position"
    assert rm.explain().startswith(f"engine: {refused if family == 'bloom' else 'packed, modules layers'}")
    torch.testing.assert_close(rm.score(text), want, rtol=0.02, atol=0.01 * scale(model))
    assert RewardModel(model, compute="fp32").explain().startswith("engine: packed, modules layers")


@pytest.mark.parametrize(
    "kw", [{"n_heads": 6}, {"attn_config": {"clip_qkv": 0.7}}, {"attn_config": {"softmax_scale": 0.1}}]
)
def test_mpt_with_odd_heads_bounds_and_scales(kw):
    model = made("mpt", **kw)
    rm = RewardModel(model)
    assert "engine: packed" in rm.explain()
    M.assert_rewards(rm.score(TEXTS, engine="packed"), M.own(model, TEXTS), scale(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_are_alike_wherever_a_number_stands(dtype):
    x = (3 * torch.randn(40000, generator=torch.Generator().manual_seed(0))).to(dtype)
    functional = nn.functional
    ways = [
        torch.sigmoid, torch.Tensor.sigmoid, functional.sigmoid, functional.silu, functional.gelu,
        lambda x: functional.gelu(x, approximate="tanh"), nn.SiLU(),
    ]  # fmt: skip
    for way in ways:
        with Alike():
            whole = way(x)
            for first, count in ((0, 1), (1, 7), (5, 33), (100, 30001)):
                assert torch.equal(way(x[first : first + count].clone()), whole[first : first + count])
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(whole, way(x), rtol=4 * eps, atol=16 * eps)


def test_a_scale_of_biased_attention_set_later_takes_part():
    model = made("bloom")
    rm = RewardModel(model)
    rm.score(TEXTS)
    for layer in layers(model):
        layer.self_attention.inv_norm_factor *= 2
    M.assert_rewards(rm.score(TEXTS), M.own(model, TEXTS), scale(model))


def test_mpt_has_no_more_positions_than_its_table_of_biases():
    assert RewardModel(made("mpt", max_seq_len=64, max_position_embeddings=64)).max_length == 64


def test_experts_whose_class_overrides_transformers_promise_no_bits():
    model = made("mixtral")
    for module in experts.experts_of(model):
        module.__class__ = type("Halved", (type(module),), {"__module__": "elsewhere"})
    assert experts.experts_of(model) == [] and experts.unknown_experts(model) == "Halved"
