"""The reward lens: what the model's own norm and head make of streams that plain hooks see (tests/oracle.py)."""

from __future__ import annotations

import importlib.util
import re
import threading

import models as M
import oracle as O
import pytest
import torch
import transformers
from torch import nn

import rmfast

TEXTS = M.token_ids([20, 13, 9, 23], seed=3)
TEXTS[1] = TEXTS[0][:11] + TEXTS[1][11:]  # shared prompts
TEXTS[3] = TEXTS[0][:16] + TEXTS[3][16:]
FAMILIES = [*M.DECODERS, "gpt2", "neox", "Bert", "ModernBert", "hooked"]


def model(family="llama", labels=1, dtype=torch.float32, **kw):
    kw.setdefault("num_hidden_layers", 3)
    if family == "neox":
        torch.manual_seed(0)
        config = transformers.GPTNeoXConfig(**{**M._SHAPE, "num_labels": labels, **kw})
        return M.randomised(transformers.GPTNeoXForSequenceClassification(config)).to(dtype)
    if family[0].isupper():
        return M.encoder(family, labels=labels, task="TokenClassification", **kw).to(dtype)
    m = M.decoder("llama" if family == "hooked" else family, labels=labels, **kw).to(dtype)
    if family == "hooked":  # rules packed runs out
        m.model.layers[1].register_forward_hook(lambda module, args, out: out * 1.25)
    return m


def final_norm(m):
    body = m.base_model
    names = ("norm", "ln_f", "final_layer_norm", "final_norm")
    return next((getattr(body, name) for name in names if hasattr(body, name)), nn.Identity())


def head(m):
    linear = next(getattr(m, name) for name in ("score", "classifier") if hasattr(m, name))
    return nn.Sequential(m.head, linear) if hasattr(m, "head") else linear


def gain(m):
    norm = final_norm(m)
    return norm.weight + 1 if "Gemma" in type(norm).__name__ else getattr(norm, "weight", 1)


def scale(m):
    weight = m.score.weight if hasattr(m, "score") else m.classifier.weight
    return float((weight * gain(m)).norm(dim=-1).max().detach())


def streams(m, ids):
    """(L + 1, T, d)."""
    kinds = [("resid_pre", 0), *(("resid_post", layer) for layer in range(len(O.layers(m))))]
    return torch.stack([O.activation(m, ids, kind, layer)[:, 0] for kind, layer in kinds])


def truth(m, ids, norm):
    """(L + 1, T, K)."""
    x = streams(m, ids)
    with torch.no_grad():
        if norm == "raw" or isinstance(final_norm(m), nn.Identity):  # BERT's layers end in a norm of their own
            return head(m)(x)
        if norm == "final":
            return head(m)(final_norm(m)(x))
        centred = x - x.mean(-1, keepdim=True) if isinstance(final_norm(m), nn.LayerNorm) else x
        eps = getattr(final_norm(m), "variance_epsilon", getattr(final_norm(m), "eps", None))
        bias = getattr(final_norm(m), "bias", None)
        normed = centred * (centred[-1].square().mean(-1, keepdim=True) + eps).rsqrt() * gain(m)
        return head(m)(normed if bias is None else normed + bias)


def assert_near(got, want, m):
    error = (got - want).abs() / want.abs().clamp(min=scale(m))
    assert got.shape == want.shape and float(error.max()) <= 1e-5, float(error.max())


# The numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["final", "frozen", "raw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_the_heads_of_what_hooks_see(family, norm):
    if norm != "final" and family == "ModernBert":
        pytest.skip("more than a linear head")
    m = model(family, labels=2)
    rm = rmfast.RewardModel(m)
    last = rm.lens(TEXTS, norm=norm, batch_tokens=24)
    every = rm.lens(TEXTS, norm=norm, positions="all", batch_tokens=24)
    assert last.layers == every.layers == 3
    for i, ids in enumerate(TEXTS):
        want = truth(m, ids, norm)
        assert_near(last.rewards[i], want[:, -1], m)
        assert_near(every.rewards[i], want, m)


@pytest.mark.parametrize("norm", ["final", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_the_score(family, norm):
    if norm == "frozen" and family == "ModernBert":
        pytest.skip("more than a linear head")
    m = model(family)
    rm = rmfast.RewardModel(m)
    for text in ([ids] for ids in TEXTS):
        lens, every = rm.lens(text, norm=norm), rm.lens(text, norm=norm, positions="all")
        assert torch.equal(lens.rewards[:, -1], lens.scores) and torch.equal(every.rewards[0][-1], every.scores[0])
        if family == "Bert":  # its last norm is run as it is, not by the op
            assert_near(lens.scores, rm.score(text), m)
            continue
        assert torch.equal(lens.scores, rm.score(text)) and torch.equal(every.scores[0], rm.token_values(text)[0])


def test_a_text_s_rewards_are_those_that_it_has_alone():
    m = model()
    rm = rmfast.RewardModel(m)
    together = rm.lens([*TEXTS, TEXTS[0]], batch_tokens=24)
    for i, text in enumerate([*TEXTS, TEXTS[0]]):
        assert_near(together.rewards[i], rm.lens([text]).rewards[0], m)


def test_frozen_layers_differ_by_what_attention_and_mlp_add_to_the_reward():
    rm = rmfast.RewardModel(model("gemma2"))
    lens, parts = rm.lens([TEXTS[0]], norm="frozen"), rm.attribute(TEXTS[0])
    added = parts.of("attn_out") + parts.of("mlp_out")
    torch.testing.assert_close(lens.rewards[0].diff(), added, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lens.rewards[0, 0], parts.of("embedding") + parts.constant, rtol=1e-4, atol=1e-5)


def test_raw_ends_in_the_head_on_a_stream_that_was_never_normalised():
    m = model()
    lens = rmfast.RewardModel(m).lens(TEXTS, norm="raw")
    assert_near(lens.rewards[0, -1], m.score(streams(m, TEXTS[0])[-1, -1]).detach()[0], m)
    assert float((lens.rewards[:, -1] - lens.scores).abs().min()) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_bf16_rewards_are_near_those_of_fp32(family):
    m = model(family)
    want = rmfast.RewardModel(m).lens(TEXTS).rewards
    got = rmfast.RewardModel(m.bfloat16()).lens(TEXTS).rewards
    assert got.dtype == torch.float32 and float((got - want).abs().max()) <= 0.05 * scale(m)


def test_an_mlp_head_and_an_unknown_norm_are_run_on_every_layer():
    m = M.mlp_head(model("llama"))

    class Odd(nn.Module):
        def forward(self, x):
            return x / (1 + x.abs().amax(-1, keepdim=True))

    m.model.norm = Odd()
    lens = rmfast.RewardModel(m).lens(TEXTS)
    with torch.no_grad():
        want = torch.stack([m.score(m.model.norm(streams(m, ids)[:, -1]))[:, 0] for ids in TEXTS])
    torch.testing.assert_close(lens.rewards, want, rtol=1e-5, atol=1e-5)


def test_directions_taken_from_the_stream_are_taken_at_every_layer():
    m = model()
    directions = torch.linalg.qr(torch.randn(48, 2, generator=torch.Generator().manual_seed(0)))[0].T
    part = directions.T @ directions
    norm, x = final_norm(m), streams(m, TEXTS[0])[:, -1]
    with torch.no_grad():
        for side in ("before", "after"):
            rm = rmfast.RewardModel(m).with_interventions(rmfast.DirectionRemoval(directions, norm=side))
            taken = norm(x - x @ part) if side == "before" else norm(x) - norm(x) @ part
            assert_near(rm.lens([TEXTS[0]]).rewards[0], m.score(taken)[:, 0], m)
            y = x - x @ part if side == "before" else x
            frozen = y * (y[-1].square().mean() + norm.variance_epsilon).rsqrt() * norm.weight
            frozen = frozen if side == "before" else frozen - frozen @ part
            assert_near(rm.lens([TEXTS[0]], norm="frozen").rewards[0], m.score(frozen)[:, 0], m)


def test_nothing_stays_behind_and_packed_runs_stay_packed():
    m = model().train()
    rm = rmfast.RewardModel(m)
    before = [(n, len(x._forward_hooks), len(x._forward_pre_hooks), x.training) for n, x in m.named_modules()]
    rm.lens(TEXTS)
    after = [(n, len(x._forward_hooks), len(x._forward_pre_hooks), x.training) for n, x in m.named_modules()]
    assert after == before and rm.explain().startswith("engine: packed, fused")
    assert not any("forward" in module.__dict__ for module in m.modules())


def test_runs_of_other_threads_are_not_read():
    m = model()
    rm = rmfast.RewardModel(m)
    want = rm.lens(TEXTS).rewards
    other = {"input_ids": torch.tensor([TEXTS[0]])}

    def disturb(module, args, out):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: m(**other))
            thread.start()
            thread.join()

    handle = m.model.embed_tokens.register_forward_hook(disturb)
    try:
        assert_near(rm.lens(TEXTS).rewards, want, m)
    finally:
        handle.remove()


def test_texts_are_read_where_score_reads_them():
    rm = rmfast.RewardModel(model(), pooling=7)
    texts = [[*[i for i in ids if i != 7][:8], 7, 1, 2] for ids in TEXTS]
    lens = rm.lens(texts)
    assert lens.read == [8] * 4 and torch.equal(lens.scores, rm.score(texts))


# The result -----------------------------------------------------------------------------------------------------------


def lens_of(rewards, **kw):
    rewards = torch.as_tensor(rewards)
    n, layers = rewards.shape[:2]
    given = {"rewards": rewards, "scores": rewards[:, -1], "layers": layers - 1, "norm": "final", "positions": "last"}
    return rmfast.Lens(**{**given, "read": [0] * n, "token_ids": [[1]] * n, "_decode": lambda ids: ["a"], **kw})


def test_margins_are_chosen_less_rejected():
    lens = lens_of([[1.0, 2, 3], [0, 1, 1], [5, 5, 5], [4, 5, 6]])
    assert lens.margins.tolist() == [[1, 1, 2], [1, 0, -1]]


def test_margins_crystallise_where_they_are_half_of_the_last():
    margins = torch.tensor([[0, 0.9, 1.2, 2], [0, -1, 0.5, 2], [0, 0, -3, -1], [0, 1, 1, 0], [0, 1, 1, torch.nan]])
    lens = lens_of(torch.stack([margins, torch.zeros_like(margins)], 1).flatten(0, 1))
    assert lens.crystallisation().tolist() == [2, 1, 2, -1, -1]
    assert lens.crystallisation(signed=True).tolist() == [2, 3, 2, -1, -1]
    both = lens_of(torch.stack([lens.rewards, 2 * lens.rewards], 2))
    assert both.crystallisation().tolist() == [[x, x] for x in [2, 1, 2, -1, -1]]


def pairs(curves):
    """A lens whose margins are these curves."""
    curves = torch.as_tensor(curves, dtype=torch.float64)
    return lens_of(torch.stack([curves, torch.zeros_like(curves)], 1).flatten(0, 1))


def test_lenses_of_other_depths_are_compared_by_relative_depth():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    fine = torch.nn.functional.interpolate(coarse[:, None], 9, mode="linear", align_corners=True)[:, 0]
    same = pairs(coarse).compare(pairs(fine))
    assert same.value == pytest.approx(1) and same.n == 12
    assert pairs(coarse).compare(pairs(-3 * coarse)).value == pytest.approx(1)  # each over its own last margin
    other = pairs(coarse).compare(pairs(torch.randn(12, 7, generator=generator)))
    assert -1 < other.low < other.value < other.high < 1


def test_pairs_without_a_margin_are_left_out_of_a_comparison():
    curves = torch.randn(14, 4, generator=torch.Generator().manual_seed(0))
    curves[0, -1], curves[1] = 0, 2
    assert pairs(curves).compare(pairs(curves)).n == 12


def test_a_result_shows_itself():
    pytest.importorskip("pandas")
    rm = rmfast.RewardModel(model(labels=2), M.tokenizer())
    last, every = rm.lens(["ab", "abcd"]), rm.lens(["ab", "abcd"], positions="all")
    assert repr(last) == "Lens(2 texts, 3 layers and the embedding, at the read token, norm 'final')"
    assert last.tokens(1) == ["<s>", "a", "b", "c", "d"] and last.read == [2, 4] and len(last) == 2
    table = last.to_dataframe()
    assert list(table) == ["text", "layer", "label", "position", "token", "reward"] and len(table) == 2 * 4 * 2
    row = table[(table.text == 1) & (table.layer == 2) & (table.label == 1)].iloc[0]
    assert row.reward == float(last.rewards[1, 2, 1]) and row.token == "d"
    table = every.to_dataframe()
    assert len(table) == 4 * (3 + 5) * 2
    row = table[(table.text == 1) & (table.layer == 2) & (table.position == 3) & (table.label == 0)].iloc[0]
    assert row.reward == float(every.rewards[1][2, 3, 0]) and row.token == "c"


def test_a_result_draws_itself():
    pytest.importorskip("matplotlib").use("Agg")
    rm = rmfast.RewardModel(model(labels=2), M.tokenizer())
    texts = [f"{a}{b}" for a in "abcdefghijk" for b in "xy"]
    lens = rm.lens(texts)
    assert lens.plot(label=1).get_legend_handles_labels()[1] == ["mean of 22 texts"]
    names = lens.plot(pairs=True).get_legend_handles_labels()[1]
    assert names[0] == "mean of 11 pairs, 95% interval"
    assert re.fullmatch(r"median crystallisation \S+ \[\S+, \S+\] \(n 11\)", names[1])
    lens.rewards[4] = torch.nan
    names = lens.plot(pairs=True).get_legend_handles_labels()[1]
    assert names[0] == "mean of 10 pairs, 95% interval" and names[1].endswith("(n 10)")
    few = rm.lens(texts[:4]).plot(pairs=True).get_legend_handles_labels()[1]
    assert few[0] == "mean of 2 pairs" and re.fullmatch(r"median crystallisation \S+ \(n 2\)", few[1])
    assert lens.plot(text=3).lines[0].get_ydata().tolist() == pytest.approx(lens.rewards[3, :, 0].tolist())
    assert lens.plot(text=-1).lines[0].get_ydata().tolist() == pytest.approx(lens.rewards[-1, :, 0].tolist())
    with pytest.raises(ValueError, match="text to be an int from -22 to 21, got 22"):
        lens.plot(text=22)
    image = rm.lens(texts[:2], positions="all").plot(text=1, label=1).images[0]
    assert image.get_array().shape == (4, 3)


def test_no_texts_give_an_empty_result():
    rm = rmfast.RewardModel(model(labels=2))
    assert rm.lens([]).rewards.shape == (0, 4, 2) and rm.lens([]).scores.shape == (0, 2)
    assert rm.lens([], positions="all").rewards == []
    if importlib.util.find_spec("pandas"):
        assert rm.lens([]).to_dataframe().empty


# Bad input ------------------------------------------------------------------------------------------------------------


def hooked_norm():
    m = model()
    m.model.norm.register_forward_hook(lambda module, args, out: out)
    return m


@pytest.mark.parametrize(
    "make, options, message",
    [
        (model, {"positions": "joint"}, 'positions to be "last" or "all", got \'joint\''),
        (model, {"norm": "none"}, "norm to be one of final, frozen, raw, got 'none'"),
        (model, {"batch_tokens": 0}, "batch_tokens to be a positive int, got 0"),
        (lambda: M.encoder("Bert"), {}, "pools by itself: lens needs a head that reads one token's stream"),
        (lambda: M.mlp_head(model()), {"norm": "frozen"}, "to be a single nn.Linear with a readable weight"),
        (
            lambda: M.encoder("Albert", task="TokenClassification", embedding_size=16),
            {},
            "AlbertModel has no list of its layers",
        ),
        (hooked_norm, {}, "its final norm (LlamaRMSNorm) to be without hooks"),
    ],
)
def test_wrong_arguments_and_models_are_named(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rmfast.RewardModel(make()).lens(TEXTS, **options)


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda: lens_of(torch.zeros(3, 4)).margins, "chosen and rejected texts alternately, an even number, got 3"),
        (lambda: lens_of(torch.zeros(2, 4), positions="all").margins, 'at the read token (positions="last") for pairs'),
        (
            lambda: pairs(torch.ones(4, 3)).compare(lens_of(torch.ones(8, 3), norm="raw")),
            "lenses of one norm, got 'final' and 'raw'",
        ),
        (lambda: pairs(torch.ones(4, 3)).compare(pairs(torch.ones(5, 3))), "lenses of the same pairs, got 4 and 5"),
        (
            lambda: pairs(torch.randn(9, 3)).compare(pairs(torch.randn(9, 3))),
            "at least 10 pairs for a mean with an int",
        ),
        (lambda: lens_of(torch.zeros(2, 4, 2)).compare(lens_of(torch.zeros(2, 4, 2))), "of one reward, K = 1, got 2"),
    ],
)
def test_statistics_of_what_has_none_are_refused(use, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        use()
