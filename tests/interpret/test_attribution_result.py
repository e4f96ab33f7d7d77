"""An attribution as a result: its axes and texts, tables and plots, the layout of a sweep; what is refused."""

from __future__ import annotations

import re

import models as M
import oracle as O
import pytest
import torch
import transformers
from frozen import FINE, IDS, biased, model, scale
from torch import nn

import rmfast
from rmfast.engine import scorer


@pytest.fixture
def fp64():
    with O.everything_in_fp64():
        yield


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
    monkeypatch.setattr("rmfast.interpret.attribution._NUMBERS", numbers)
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
    for name in ("run_packed", "run_padded"):
        run = getattr(scorer, name)
        monkeypatch.setattr(scorer, name, lambda *a, name=name, run=run: (ways.append(name), run(*a))[1])
    texts = M.token_ids([5, 9, 13], seed=1)
    packed = rmfast.RewardModel(m).attribute(texts, components=FINE, positions="all")
    O.layers(m)[1].register_forward_hook(lambda module, args, out: None)
    padded = rmfast.RewardModel(m).attribute(texts, components=FINE, positions="all")
    assert ways == ["run_packed", "run_padded"]
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
        (
            {},
            {"positions": "joint", "sites": "head_out"},
            "component to be one of embedding, attn_out, mlp_out, got 'head",
        ),
        ({}, {"positions": "joint", "metric": lambda r: r[0]}, "the rewards themselves, 2, without metric"),
    ],
)
def test_sweeps_that_contributions_do_not_fit_are_refused(found, swept, message):
    rm = rmfast.RewardModel(model("llama", torch.float32, labels=2))
    sweep = rm.patch_sweep(IDS, M.token_ids([21], seed=4)[0], **{"sites": "mlp_out", **swept})
    with pytest.raises(ValueError, match=re.escape(message)):
        rm.attribute(IDS, **found).like(sweep)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"components": ["attn", "mlp"]}, "components to be of embedding, attn_out, head_out"),
        ({"components": []}, "components to be of"),
        ({"components": ["mlp_out", "mlp_out"]}, "components to be different ones, got"),
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
