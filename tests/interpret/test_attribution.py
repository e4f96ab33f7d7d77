"""Direct attribution: sums that give the reward, and parts that plain hooks on the model give (tests/oracle.py)."""

from __future__ import annotations

import contextlib

import models as M
import oracle as O
import pytest
import torch
import transformers
from frozen import FAMILIES, FINE, IDS, POST_NORM, biased, head, model, scale, slope

import rmfast
from rmfast.interpret.components import _CHUNK_ELEMENTS


@pytest.fixture
def fp64():
    with O.everything_in_fp64():
        yield


@pytest.mark.parametrize("components", [("embedding", "attn_out", "mlp_out"), FINE], ids=["parts", "units"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_total_is_the_reward(family, dtype, components):
    m = model(family, dtype)
    with O.everything_in_fp64() if dtype == torch.float64 else contextlib.nullcontext():
        rm = rmfast.RewardModel(m)
        found = rm.attribute(IDS, components=components)
        want = rm.score([IDS])[0]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    for got in (found.total, found.rewards):
        assert got.dtype == dtype and got.shape == () and abs(float(got - want)) <= tolerance * scale(m)


@pytest.mark.parametrize("components", [("embedding", "attn_out", "mlp_out"), FINE], ids=["parts", "units"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "neox", "phi3-longrope"])
def test_every_token_gives_its_own_value(family, components, fp64):
    m = model(family, labels=2)
    ids = M.token_ids([40])[0]
    rm = rmfast.RewardModel(m)
    found = rm.attribute(ids, components=components, positions="all")
    want = rm.token_values([ids])[0]
    torch.testing.assert_close(found.total, want, rtol=0, atol=1e-9 * scale(m))
    torch.testing.assert_close(found.rewards, want, rtol=0, atol=1e-9 * scale(m))
    last = rm.attribute(ids, components=components)
    for name, x in found.contributions.items():
        at = found.axes[name].index("position")
        assert last.axes[name] == tuple(axis for axis in found.axes[name] if axis != "position")
        torch.testing.assert_close(x.select(at, -1), last.contributions[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_s_bias_and_a_norm_s_bias_are_the_constant(family, fp64):
    m = biased(model(family, labels=3), 3)
    rm = rmfast.RewardModel(m)
    found = rm.attribute(IDS)
    constant = m.score.bias if family == "llama" else m.score.bias + m.score.weight @ m.transformer.ln_f.bias
    torch.testing.assert_close(found.constant, constant.detach())
    torch.testing.assert_close(found.total, rm.score([IDS])[0], rtol=0, atol=1e-9 * scale(m))
    raw = rm.attribute(IDS, norm="raw")
    torch.testing.assert_close(raw.constant, m.score.bias.detach())


def test_token_classification_heads_have_attributions(fp64):
    m = model("llama", labels=2, task="TokenClassification")
    rm = rmfast.RewardModel(m)
    found = rm.attribute(IDS, components=FINE, positions="all")
    torch.testing.assert_close(found.total, rm.token_values([IDS])[0], rtol=0, atol=1e-9 * scale(m))


def test_bf16_totals_are_as_near_to_the_reward_as_its_rounding():
    m = model("gemma2", torch.bfloat16)
    rm = rmfast.RewardModel(m)
    for components in (("embedding", "attn_out", "mlp_out"), FINE):
        found = rm.attribute(IDS, components=components)
        assert found.total.dtype == torch.float32 and abs(float(found.total - found.rewards)) <= 0.02 * scale(m)


def test_the_token_that_is_read_is_the_one_that_score_reads(fp64):
    m = model("llama")
    rm = rmfast.RewardModel(m, pooling=7)
    ids = [*IDS[:9], 7, *[i for i in IDS[9:] if i != 7]]
    found = rm.attribute(ids)
    assert found.read == 9
    torch.testing.assert_close(found.total, rm.score([ids])[0], rtol=0, atol=1e-9 * scale(m))


@pytest.mark.parametrize("norm", ["frozen", "raw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_the_dots_of_what_hooks_see(family, norm, fp64):
    m = model(family, labels=2)
    found = rmfast.RewardModel(m).attribute(IDS, positions="all", norm=norm)
    direction = slope(m, IDS) if norm == "frozen" else head(m).weight.detach()[:, None]
    for name, kind in (("embedding", "resid_pre"), ("attn_out", "attn_out"), ("mlp_out", "mlp_out")):
        parts = torch.stack([O.activation(m, IDS, kind, layer)[:, 0] for layer in range(3)])
        want = torch.einsum("ltd,ktd->ltk", parts, direction.expand(-1, len(IDS), -1))
        got = found.of(name)
        torch.testing.assert_close(got, want[0] if name == "embedding" else want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind, whole, projection", [("head_out", "attn_out", 0), ("mlp_neuron", "mlp_out", 1)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "phi3", "gpt2", "neox"])
def test_a_unit_s_part_is_what_the_block_gives_for_it_alone(family, kind, whole, projection, fp64):
    m = model(family)
    names = {"gpt2": ("attn.c_proj", "mlp.c_proj"), "neox": ("attention.dense", "mlp.dense_4h_to_h")}
    name = names.get(family, ("self_attn.o_proj", "mlp.down_proj"))[projection]
    found = rmfast.RewardModel(m).attribute(IDS, components=kind, positions="all")
    direction = slope(m, IDS)[0]
    for layer, block in enumerate(O.layers(m)):
        linear, x = block.get_submodule(name), O.activation(m, IDS, kind, layer)
        with torch.no_grad():
            bias, given = linear(torch.zeros_like(x.flatten(1))), linear(x.flatten(1))
            for unit in (0, x.size(1) - 1):
                alone = torch.zeros_like(x)
                alone[:, unit] = x[:, unit]
                out = linear(alone.flatten(1)) - bias
                if family in POST_NORM:
                    norm = block.get_submodule(("post_attention_layernorm", "post_feedforward_layernorm")[projection])
                    out = out * (1 + norm.weight) / (given.square().mean(-1, keepdim=True) + norm.eps).sqrt()
                want = (out * direction).sum(-1)
                torch.testing.assert_close(found.of(kind)[layer, :, unit], want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("norm", ["frozen", "raw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_sum_to_attention_and_neurons_to_the_mlp(family, norm, fp64):
    rm = rmfast.RewardModel(model(family, labels=2))
    parts = rm.attribute(IDS, positions="all", norm=norm)
    units = rm.attribute(IDS, components=FINE, positions="all", norm=norm)
    for whole in ("attn_out", "mlp_out"):
        torch.testing.assert_close(units.of(whole), parts.of(whole), rtol=1e-9, atol=1e-9)
    heads = units.of("head_out").sum(2)
    torch.testing.assert_close(heads + units.of("attn_bias"), parts.of("attn_out"), rtol=1e-9, atol=1e-9)
    assert bool(units.of("attn_bias").any()) == (family in ("gpt2", "neox"))


def test_raw_contributions_sum_to_the_head_on_the_stream_before_the_norm():
    m = biased(model("llama"))
    found = rmfast.RewardModel(m).attribute(IDS, norm="raw")
    stream = O.activation(m, IDS, "resid_post", 2)[-1, 0]
    torch.testing.assert_close(found.total, m.score(stream).detach()[0])
    assert abs(float(found.total - found.rewards)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_adapters_are_seen_by_heads_and_neurons(family, fp64):
    peft = pytest.importorskip("peft")
    targets = {"gpt2": ["c_proj"]}.get(family, ["o_proj", "down_proj"])
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=targets, lora_dropout=0.2)
    m = model(family)
    wrapped = peft.get_peft_model(m, config).double()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    rm = rmfast.RewardModel(wrapped)
    found, parts = rm.attribute(IDS, components=FINE), rm.attribute(IDS)
    for whole in ("attn_out", "mlp_out"):
        torch.testing.assert_close(found.of(whole), parts.of(whole), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.total, rm.score([IDS])[0], rtol=0, atol=1e-9 * M.reward_scale(m))


@pytest.mark.parametrize("family", ["Olmo2", "Glm4", "Phi", "Starcoder2"])
def test_other_families_add_up(family):
    config = getattr(transformers, f"{family}Config")(**{**M._SHAPE, "num_labels": 1})
    torch.manual_seed(0)
    rm = rmfast.RewardModel(M.randomised(getattr(transformers, f"{family}ForSequenceClassification")(config)))
    found, parts = rm.attribute(IDS, components=FINE), rm.attribute(IDS)
    torch.testing.assert_close(found.total, rm.score([IDS])[0], rtol=1e-5, atol=1e-5)
    for whole in ("attn_out", "mlp_out"):
        torch.testing.assert_close(found.of(whole), parts.of(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["quantised", "offloaded", "inference"])
def test_weights_that_autograd_can_not_hold_as_they_are(kind, tmp_path):
    if kind == "quantised":
        m = M.quantised()
    elif kind == "offloaded":
        accelerate = pytest.importorskip("accelerate")
        m = M.decoder("llama")
        names = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "score"), "cpu")
        m = accelerate.dispatch_model(
            m, {**names, "model.layers": "disk"}, main_device="cpu", offload_dir=str(tmp_path)
        )
        assert m.model.layers[0].self_attn.o_proj.weight.is_meta
    else:
        with torch.inference_mode():
            m = M.decoder("gemma2")
    rm = rmfast.RewardModel(m)
    found = rm.attribute(IDS, components=FINE)
    torch.testing.assert_close(found.total, rm.score([IDS])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.of("attn_out"), rm.attribute(IDS).of("attn_out"), rtol=1e-5, atol=1e-6)


def test_units_are_reduced_a_few_tokens_at_a_time(monkeypatch):
    rm = rmfast.RewardModel(model("llama", torch.float32, labels=2))
    whole = rm.attribute(IDS, components=FINE, positions="all")
    monkeypatch.setitem(_CHUNK_ELEMENTS, "cpu", 200)  # of 48 and 80 columns
    parts = rm.attribute(IDS, components=FINE, positions="all")
    for name in ("head_out", "mlp_neuron"):
        assert torch.equal(parts.of(name), whole.of(name))
