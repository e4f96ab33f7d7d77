"""Direct attribution: sums that give the reward, and parts that plain hooks on the model give (tests/oracle.py)."""

from __future__ import annotations

import contextlib
import re

import models as M
import oracle as O
import pytest
import torch
import transformers
from torch import nn

import rmfast
from rmfast import attribution

IDS = M.token_ids([21], seed=3)[0]
FINE = ("embedding", "head_out", "mlp_neuron")
FAMILIES = [*M.DECODERS, "gpt2", "neox"]
POST_NORM = ("gemma2", "gemma3")


def model(family="llama", dtype=torch.float64, labels=1, **kw):
    if family != "neox":
        return M.decoder(family, labels=labels, num_hidden_layers=3, **kw).to(dtype)
    config = transformers.GPTNeoXConfig(**{**M._SHAPE, "num_hidden_layers": 3, "num_labels": labels})
    torch.manual_seed(0)
    return M.randomised(transformers.GPTNeoXForSequenceClassification(config)).to(dtype)


def biased(m, labels=1):
    """A head with a bias."""
    m.score = nn.Linear(m.config.hidden_size, labels).to(m.dtype)
    return m


def final_norm(m):
    body = m.base_model
    return next(getattr(body, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(body, name))


def head(m):
    return next(getattr(m, name) for name in ("score", "classifier") if hasattr(m, name))


def scale(m):
    """‖γ⊙w‖₂."""
    norm = final_norm(m)
    gain = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
    return float((head(m).weight * gain).norm(dim=-1).max().detach())


def slope(m, ids):
    """(K, T, d): the reward as a linear map of the stream, its final norm frozen at this text, by that very norm."""
    with torch.no_grad():
        stream = O.activation(m, ids, "resid_post", len(O.layers(m)) - 1)[:, 0]
        norm, w = final_norm(m), head(m).weight
        gain = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
        centred = stream - stream.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else stream
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        a = w * gain
        a = a - a.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else a
        return a[:, None] / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.fixture
def fp64():
    with O.everything_in_fp64():
        yield


# The sum --------------------------------------------------------------------------------------------------------------


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


# The parts ------------------------------------------------------------------------------------------------------------


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
    monkeypatch.setitem(attribution._CHUNK_ELEMENTS, "cpu", 200)  # of 48 and 80 columns
    parts = rm.attribute(IDS, components=FINE, positions="all")
    for name in ("head_out", "mlp_neuron"):
        assert torch.equal(parts.of(name), whole.of(name))


# The result -----------------------------------------------------------------------------------------------------------


def test_axes_are_named_and_components_are_those_asked_for():
    rm = rmfast.RewardModel(model("llama", labels=2), M.tokenizer())
    found = rm.attribute("ab", components=["mlp_neuron", "embedding"], positions="all")
    assert found.axes == {
        "embedding": ("position", "label"),
        "mlp_neuron": ("layer", "position", "neuron", "label"),
        "mlp_bias": ("layer", "position", "label"),
    }
    shapes = {name: tuple(x.shape) for name, x in found.contributions.items()}
    assert shapes == {"embedding": (3, 2), "mlp_neuron": (3, 3, 80, 2), "mlp_bias": (3, 3, 2)}
    assert found.tokens == ["<s>", "a", "b"] and len(found.token_ids) == 3 and found.read == 2
    heads = rm.attribute("ab", components="head_out")
    assert heads.axes == {"head_out": ("layer", "head", "label"), "attn_bias": ("layer", "label")}
    assert heads.of("attn_out").shape == (3, 2)
    assert repr(heads) == "Attribution(norm 'frozen', at token 2 'b' of 3, head_out 3 × 4 × 2, attn_bias 3 × 2)"


@pytest.mark.parametrize("numbers", [1 << 26, 3000], ids=["at once", "some texts at a time"])
@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "neox", "phi3-longrope"])
def test_each_text_of_a_list_has_the_parts_that_it_has_alone(family, positions, numbers, fp64, monkeypatch):
    monkeypatch.setattr(attribution, "_NUMBERS", numbers)
    rm = rmfast.RewardModel(model(family, labels=2))
    texts = M.token_ids([5, 9, 40, 1], seed=1)
    texts += [texts[2][:30] + texts[1], texts[2][:20]]  # beginnings that are run once
    for components in (("embedding", "attn_out", "mlp_out"), FINE):
        for found, text in zip(rm.attribute(texts, components=components, positions=positions), texts, strict=True):
            alone = rm.attribute(text, components=components, positions=positions)
            assert found.token_ids == text and found.axes == alone.axes and found.read == alone.read
            torch.testing.assert_close(found.rewards, alone.rewards, rtol=1e-9, atol=1e-9)
            for name, x in alone.contributions.items():
                torch.testing.assert_close(found.of(name), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_texts_run_packed_but_where_hooks_expect_batches(family, monkeypatch):
    m = model(family, torch.float32)
    if family == "gemma2":  # the oldest transformers' SDPA leaves out its softcap
        m.set_attn_implementation("eager")
    ways = []
    for name in ("_run_packed", "_run_padded"):
        run = getattr(rmfast.RewardModel, name)
        monkeypatch.setattr(rmfast.RewardModel, name, lambda *a, name=name, run=run: (ways.append(name), run(*a))[1])
    texts = M.token_ids([5, 9, 13], seed=1)
    packed = rmfast.RewardModel(m).attribute(texts, components=FINE, positions="all")
    O.layers(m)[1].register_forward_hook(lambda module, args, out: None)
    padded = rmfast.RewardModel(m).attribute(texts, components=FINE, positions="all")
    assert ways == ["_run_packed", "_run_padded"]
    for a, b in zip(packed, padded, strict=True):
        assert a.axes == b.axes
        for name, x in a.contributions.items():
            torch.testing.assert_close(x, b.of(name), rtol=1e-5, atol=1e-5 * scale(m))


def test_results_share_no_memory_with_each_other_or_the_model():
    m = biased(model("llama", torch.float32))
    texts = M.token_ids([5, 9], seed=1)
    first, second = rmfast.RewardModel(m).attribute(texts)
    for x in (first.rewards, first.constant, *first.contributions.values()):
        assert x.untyped_storage().nbytes() == x.nbytes
    first.constant.zero_()
    assert second.constant == m.score.bias.detach()[0] != 0


def test_no_texts_have_no_results():
    assert rmfast.RewardModel(model("llama", torch.float32)).attribute([]) == []


def test_texts_are_cut_and_formatted_as_by_score():
    rm = rmfast.RewardModel(model("llama"), M.tokenizer())
    found = rm.attribute(("abc", "defg"), max_length=6, truncation="left")
    assert found.tokens == ["<s>", "c", "d", "e", "f", "g"]


def test_nothing_stays_behind_in_the_model():
    m = model("gemma2", torch.float32).train()
    before = [(n, len(x._forward_hooks), len(x._forward_pre_hooks), x.training) for n, x in m.named_modules()]
    rmfast.RewardModel(m).attribute(IDS, components=FINE)
    after = [(n, len(x._forward_hooks), len(x._forward_pre_hooks), x.training) for n, x in m.named_modules()]
    assert after == before and all(p.grad is None and p.requires_grad for p in m.parameters())


def test_hooks_on_layers_take_part(fp64):
    m = model("llama")
    m.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, out: out * 0.5)
    rm = rmfast.RewardModel(m)
    found = rm.attribute(IDS, components=FINE)
    torch.testing.assert_close(found.total, rm.score([IDS])[0], rtol=0, atol=1e-9 * scale(m))


def test_a_table_has_a_row_for_each_contribution():
    pytest.importorskip("pandas")
    rm = rmfast.RewardModel(model("llama", labels=2), M.tokenizer())
    found = rm.attribute("ab", components=["embedding", "head_out"], positions="all")
    table = found.to_dataframe()
    assert list(table) == ["component", "layer", "position", "head", "label", "token", "contribution"]
    assert len(table) == sum(x.numel() for x in found.contributions.values())
    row = table[
        (table.component == "head_out") & (table.layer == 2) & (table.position == 1) & (table["head"] == 3)
    ].iloc[1]
    assert row.contribution == float(found.of("head_out")[2, 1, 3, 1]) and row.token == "a" and row.label == 1
    last = rm.attribute("ab").to_dataframe()
    assert list(last) == ["component", "layer", "label", "token", "contribution"] and set(last.token) == {"b"}


def test_contributions_are_drawn_by_layer():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    rm = rmfast.RewardModel(model("llama", labels=2), M.tokenizer())
    last = rm.attribute("ab", components=["embedding", "head_out", "mlp_out"])
    bars = last.plot(label=1).containers
    heights = [[bar.get_height() for bar in each] for each in bars]
    for got, name in zip(heights, ("attn_out", "mlp_out", "embedding"), strict=True):
        assert got == pytest.approx(last.of(name)[..., 1].reshape(-1).tolist())
    torch.testing.assert_close(
        torch.from_numpy(last.plot("head_out").images[0].get_array().data), last.of("head_out")[..., 0]
    )
    every = rm.attribute("ab", components=["embedding", "head_out"], positions="all")
    assert every.plot("head_out").images[0].get_array().shape == (3, 3)  # heads summed, layers by tokens
    assert every.plot("embedding").images[0].get_array().shape == (1, 3)
    with pytest.raises(ValueError, match="Expected a component to draw at every token: embedding, head_out, attn_bias"):
        every.plot()
    matplotlib.pyplot.close("all")


# Beside a sweep -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [["attn_out", "mlp_out"], "head_out"])
def test_contributions_take_the_layout_of_a_sweep(sites):
    rm = rmfast.RewardModel(model("llama", labels=2))
    other = M.token_ids([21], seed=4)[0]
    sweep = rm.patch_sweep(IDS, other, sites=sites, positions="joint", layers=[2, 0])
    found = rm.attribute(IDS, components=FINE)
    grid = found.like(sweep)
    assert grid.shape == sweep.rewards.shape
    if sites == "head_out":
        assert torch.equal(grid[:, 0], found.of("head_out")[[2, 0]])
        assert torch.equal(found.like(sweep.select(head=[1], label=0))[:, 0, 0], found.of("head_out")[[2, 0], 1, 0])
    else:
        assert torch.equal(grid[1, :, 0], found.of("mlp_out")[[2, 0]])


def test_without_a_norm_the_last_mlp_s_part_is_what_patching_it_does(fp64):
    m = model("llama")
    m.model.norm = nn.Identity()
    rm = rmfast.RewardModel(m)
    clean, corrupted = IDS, M.token_ids([21], seed=4)[0]
    sweep = rm.patch_sweep(clean, corrupted, mode="noising", sites=["attn_out", "mlp_out"], positions="joint")
    change = rm.attribute(corrupted).like(sweep) - rm.attribute(clean).like(sweep)
    torch.testing.assert_close(change[1, 2], sweep.effect[1, 2], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(change[0], sweep.effect[0], rtol=0.1)


@pytest.mark.parametrize(
    "found, swept, message",
    [
        ({"positions": "all"}, {"positions": "joint"}, 'at the read token (positions="last")'),
        ({}, {"positions": [0, 1]}, "one group of positions"),
        ({}, {"positions": "joint", "sites": ["attn_out", "head_out"]}, "kinds with the same units"),
        ({}, {"positions": "joint", "sites": "head_out"}, "a component among embedding, attn_out, mlp_out, got 'head"),
        ({}, {"positions": "joint", "metric": lambda r: r[0]}, "the rewards themselves, 2, without metric"),
    ],
)
def test_sweeps_that_contributions_do_not_fit_are_refused(found, swept, message):
    rm = rmfast.RewardModel(model("llama", torch.float32, labels=2))
    sweep = rm.patch_sweep(IDS, M.token_ids([21], seed=4)[0], **{"sites": "mlp_out", **swept})
    with pytest.raises(ValueError, match=re.escape(message)):
        rm.attribute(IDS, **found).like(sweep)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"components": ["attn", "mlp"]}, "components to be different ones of embedding, attn_out, head_out"),
        ({"components": []}, "components to be different ones of"),
        ({"components": ["mlp_out", "mlp_out"]}, "components to be different ones of"),
        ({"components": ["attn_out", "head_out"]}, "components with attn_out or head_out, which it is the sum of"),
        ({"positions": "joint"}, 'positions to be "last" or "all", got \'joint\''),
        ({"norm": "final"}, 'norm to be "frozen" or "raw", got \'final\''),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rmfast.RewardModel(model("llama", torch.float32)).attribute(IDS, **options)


def no_norm_formula():
    m = model("llama", torch.float32)

    class Odd(nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    m.model.norm = Odd()
    return m


def hooked_norm():
    m = model("llama", torch.float32)
    m.model.norm.register_forward_hook(lambda module, args, out: out)
    return m


def hooked_projection():
    m = model("llama", torch.float32)
    m.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, out: out.tanh())
    return m


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: M.mlp_head(model("llama", torch.float32)), "to be a single nn.Linear with a readable weight"),
        (lambda: M.encoder("Bert"), "pools by itself: expected a head that reads one token's stream"),
        (lambda: M.encoder("Bert", task="TokenClassification"), "layers that add their attention and MLP to the resid"),
        (no_norm_formula, 'final norm to be an RMS or layer norm with a readable weight, or norm="raw", got Odd'),
        (hooked_norm, "its final norm (LlamaRMSNorm) to be without hooks"),
        (
            hooked_projection,
            "head_out to make attn_out through a linear map and a norm behind it alone; behind the Lin",
        ),
    ],
)
def test_models_whose_reward_is_no_such_sum_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rmfast.RewardModel(make()).attribute(IDS, components=FINE)


def test_raw_needs_no_norm_that_is_known():
    m = no_norm_formula()
    found = rmfast.RewardModel(m).attribute(IDS, norm="raw")
    stream = O.activation(m, IDS, "resid_post", 2)[-1, 0]
    torch.testing.assert_close(found.total, m.score(stream).detach()[0], rtol=1e-5, atol=1e-5)


def test_parts_that_layers_lack_are_named():
    config = transformers.MixtralConfig(**{**M._SHAPE, "num_labels": 1, "num_local_experts": 2})
    torch.manual_seed(0)
    rm = rmfast.RewardModel(M.randomised(transformers.MixtralForSequenceClassification(config)))
    assert abs(float(rm.attribute(IDS).total - rm.score([IDS])[0])) <= 1e-5 * M.reward_scale(rm.model)
    with pytest.raises(ValueError, match=r"to have mlp_neuron: rmfast looks for mlp\.down_proj"):
        rm.attribute(IDS, components="mlp_neuron")
