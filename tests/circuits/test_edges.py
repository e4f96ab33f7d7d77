"""Edge attribution against plain autograd on unmodified models (plain_edges.py), its sum rules and a planted path."""

from __future__ import annotations

import copy
import json

import families
import models as M
import numpy as np
import oracle as O
import plain_edges as P
import pytest
import torch

import rmfast
from rmfast.circuits import edges
from rmfast.circuits.edges import edge_attribution
from rmfast.circuits.nodes import Node
from rmfast.circuits.scores import EdgeScores

CLEAN, OTHER, LONGER = M.token_ids([9, 9, 11], seed=3)
OTHER[:2] = CLEAN[:2]
MAKERS = {
    **{name: (lambda name=name: M.decoder(name)) for name in ("llama", "qwen3", "gemma2", "gpt2")},
    **{name: (lambda name=name: families.model(name)) for name in ("neox", "phi")},
}


@pytest.fixture
def fp64():
    with O.everything_in_fp64():
        yield


def scored(model, clean=CLEAN, corrupted=OTHER, **options):
    return edge_attribution(rmfast.RewardModel(model), clean, corrupted, **options)


def assert_edges(got: EdgeScores, want: dict) -> None:
    """The same edges, and the same scores to 1e-9 of the largest."""
    assert got.edges == len(want)
    largest = max(map(abs, want.values()))
    error = max(abs(got[edge] - value) for edge, value in want.items())
    assert error <= 1e-9 * max(1, largest), error


@pytest.mark.parametrize("family", MAKERS)
def test_scores_are_those_of_plain_autograd(family, fp64):
    model = MAKERS[family]().double()
    got = scored(model)
    assert_edges(got, P.scores(model, CLEAN, OTHER))
    rewards = [float(P.run(model, ids)[0].detach()) for ids in (CLEAN, OTHER)]
    np.testing.assert_allclose([got.clean, got.corrupted], rewards, rtol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("rule, way", [("left", [0, 1 / 3, 2 / 3]), ("midpoint", [1 / 6, 1 / 2, 5 / 6])])
def test_integrated_gradients_are_the_mean_over_embeddings_between(family, rule, way, fp64):
    model = MAKERS[family]().double()
    assert_edges(scored(model, steps=3, rule=rule), P.scores(model, CLEAN, OTHER, way))


@pytest.mark.parametrize("family", ["falcon-7b", "opt", "olmo2"])
def test_layers_of_other_makes_pass_the_sum_rule(family, fp64):
    """One norm for both blocks and a sum in place; an MLP in the layer itself; norms behind blocks alone."""
    got = scored(families.model(family).double(), steps=48)
    assert float(got.scores[0].nansum()) == pytest.approx(got.corrupted - got.clean, rel=0.01)


def test_adapters_are_part_of_the_projections(fp64):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(M.decoder("llama"), config).double().eval()
    got = scored(model)
    want = scored(model.merge_and_unload())
    torch.testing.assert_close(got.scores, want.scores, rtol=0, atol=1e-9, equal_nan=True)


def test_batches_of_steps_and_of_tokens_change_nothing(fp64, monkeypatch):
    rm = rmfast.RewardModel(M.decoder("llama").double())
    want = edge_attribution(rm, CLEAN, OTHER, steps=5).scores
    monkeypatch.setattr(edges, "_ELEMENTS", 2 * 48 * 11)
    monkeypatch.setattr(edges, "_ROWS", 2 * len(CLEAN))
    torch.testing.assert_close(edge_attribution(rm, CLEAN, OTHER, steps=5).scores, want, equal_nan=True)


def test_scores_of_the_embedding_sum_to_the_change_of_the_reward(fp64):
    model = M.decoder("gemma2").double()
    errors = []
    for steps in (8, 32, 128):
        got = scored(model, steps=steps)
        errors.append(abs(float(got.scores[0].nansum()) - (got.corrupted - got.clean)))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 1e-3 * abs(got.corrupted - got.clean)


def test_tokens_add_up_and_those_before_the_first_change_have_none(fp64):
    rm = rmfast.RewardModel(M.decoder("llama").double())
    want, got = edge_attribution(rm, CLEAN, OTHER), edge_attribution(rm, CLEAN, OTHER, positions="all")
    assert got.scores.shape == (len(CLEAN), *want.scores.shape)
    torch.testing.assert_close(got.joint, want.scores, equal_nan=True)
    assert not got.scores[:2].nan_to_num().any()
    assert got.scores[2].nan_to_num().any()


def test_texts_of_other_lengths_are_aligned_as_in_sweeps(fp64):
    model = M.decoder("llama").double()
    align = {0: 0, 2: 4, 8: 10}
    (own, _), (other, _) = P.written(model, CLEAN), P.written(model, LONGER)
    slopes = P.gradients(model, CLEAN)
    at, to = list(align), list(align.values())
    want = {
        (u, v): float(((other[u][to] - own[u][at]) * slopes[v][at]).sum())
        for u in own for v in slopes if P.sees(model, u, v)
    }  # fmt: skip
    assert_edges(scored(model, corrupted=LONGER, align=align), want)


def test_texts_of_which_no_tokens_correspond_are_refused():
    with pytest.raises(ValueError, match="Expected align to give a token of the clean text a partner"):
        scored(M.decoder("llama"), corrupted=LONGER, align={})


def test_a_gradient_is_of_the_metric_that_is_asked_for(fp64):
    model = M.decoder("llama", labels=3).double()
    with pytest.raises(ValueError, match="Expected metric, a number of the 3 rewards"):
        scored(model)
    got = scored(model, metric=lambda rewards: rewards[1] - 2 * rewards[2])
    (own, _), (other, _) = P.written(model, CLEAN), P.written(model, OTHER)
    one, two = (P.gradients(model, CLEAN, label=label) for label in (1, 2))
    want = {
        (u, v): float(((other[u] - own[u]) * (one[v] - 2 * two[v])).sum())
        for u in own for v in one if P.sees(model, u, v)
    }  # fmt: skip
    assert_edges(got, want)
    for metric, error in ((lambda r: r, "tensor of one number"), (lambda r: r.detach()[0], "depends on the rewards")):
        with pytest.raises(ValueError, match=error):
            scored(model, metric=metric)


def test_pairs_are_averaged_or_weighted(fp64):
    rm = rmfast.RewardModel(M.decoder("llama").double())
    texts = M.token_ids([7, 7, 8, 8], seed=5)
    each = [edge_attribution(rm, a, b) for a, b in (texts[:2], texts[2:])]
    got = edge_attribution(rm, texts[::2], texts[1::2])
    torch.testing.assert_close(got.scores, (each[0].scores + each[1].scores) / 2, equal_nan=True)
    torch.testing.assert_close(got.error, (each[0].scores - each[1].scores).abs() / 2, equal_nan=True)
    margin = edge_attribution(rm, texts[::2], texts[1::2], weights=[1, -1])
    torch.testing.assert_close(margin.scores, each[0].scores - each[1].scores, equal_nan=True)
    assert margin.clean == pytest.approx(each[0].clean - each[1].clean)
    assert margin.error is None
    with pytest.raises(ValueError, match='one pair with positions="all"'):
        edge_attribution(rm, texts[::2], texts[1::2], positions="all")


def test_models_stored_in_16_bits_run_in_fp32():
    stored = M.decoder("llama").bfloat16()
    got, want = scored(stored, steps=2), scored(copy.deepcopy(stored).float(), steps=2)
    assert got.dtype == "float32"
    torch.testing.assert_close(got.scores, want.scores, rtol=0, atol=1e-5, equal_nan=True)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Expected a decoder whose layers rmfast takes apart"):
        scored(M.encoder("Bert"))
    with pytest.raises(ValueError, match="Expected a decoder whose layers rmfast takes apart"):
        scored(M.decoder("bloom"))


def planted() -> rmfast.RewardModel:
    """Reward = what head 3 of layer 0 moves from channel 0 to 1, the MLP of layer 1 from 1 to 3, and the head reads.

    Heads 2 and 3 share the value that carries it. All other weights are noise of a hundredth of that.
    """
    model = M.decoder("llama", hidden_size=16, intermediate_size=8, num_hidden_layers=3)
    parameters = dict(model.named_parameters())
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(torch.ones_like(p) if "norm" in name else 0.01 * torch.randn(p.shape, generator=noise))
        embed = parameters["model.embed_tokens.weight"]
        embed[:, 2] = 10  # so that the norms scale all texts alike
        embed[[43, 45], 0] = torch.tensor([1.0, -1.0])
        first, second = model.model.layers[0].self_attn, model.model.layers[1].mlp
        first.v_proj.weight[4, 0] = first.o_proj.weight[1, 12] = 2  # of K/V head 1, read by query head 3
        second.gate_proj.weight[0, 2] = second.up_proj.weight[0, 1] = second.down_proj.weight[3, 0] = 2
        parameters["score.weight"][0, 3] = 2
    return rmfast.RewardModel(model)


PATH = {
    (Node("embedding"), Node("v_input", 0, 1)),
    (Node("head_out", 0, 3), Node("mlp_input", 1)),
    (Node("mlp_out", 1), Node("reward")),
}


@pytest.mark.parametrize("steps", [None, 5])
def test_the_edges_of_a_planted_path_are_found(steps):
    found = edge_attribution(planted(), [43] * 6, [45] * 6, steps=steps)
    assert {edge[:2] for edge in found.top(3)} == PATH
    assert abs(found.top(4)[3].score) < 0.3 * abs(found.top(3)[2].score)
    screened = found.screen(3)
    assert set(screened.edges) == PATH
    assert screened.senders == [Node("embedding"), Node("head_out", 0, 3), Node("mlp_out", 1)]
    assert screened.receivers == [Node("v_input", 0, 1), Node("mlp_input", 1), Node("reward")]
    assert screened.calls == [(u, [v]) for u, v in zip(screened.senders, screened.receivers)]


def test_scores_are_ranked_shown_and_kept(tmp_path):
    found = scored(M.decoder("llama"), positions="all")
    edge, *_ = found.top(1)
    assert found[edge[:2]] == pytest.approx(edge.score)
    assert abs(edge.score) == pytest.approx(float(found.joint.abs().nan_to_num().max()))
    assert str(edge) in str(found)
    with pytest.raises(ValueError, match="does not read it"):
        found[Node("mlp_out", 1), Node("mlp_input", 0)]
    with pytest.raises(ValueError, match="Expected edge to be a sender and a receiver of this model"):
        found[Node("mlp_out", 2), Node("reward")]
    exact = {edge[:2]: 2 * edge.score for edge in found.top(5)}
    assert found.agreement(exact) == pytest.approx(1)
    for wrong, message in (
        (list(exact), "exact to be effects by"),
        ({0: 1.0}, "an edge of exact to be a sender and a receiver"),
        (dict.fromkeys(exact, float("nan")), "an effect of exact to be a finite number"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            found.agreement(wrong)
    found.save(tmp_path)
    again = EdgeScores.load(tmp_path)
    assert repr(again) == repr(found)
    assert again.senders == found.senders
    assert torch.equal(again.scores.nan_to_num(), found.scores.nan_to_num())
    with pytest.raises(ValueError, match=r"Expected a folder that EdgeScores\.save wrote"):
        EdgeScores.load(tmp_path / "none")
    told = json.loads((tmp_path / "edges.json").read_text())
    (tmp_path / "edges.json").write_text(json.dumps({**told, "senders": told["senders"][1:]}))
    with pytest.raises(ValueError, match=r"scores of shape .* by the nodes"):
        EdgeScores.load(tmp_path)


def test_scores_as_a_table_and_a_map():
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    found = scored(M.decoder("llama"))
    table = found.to_dataframe()
    assert len(table) == found.edges
    row = table.iloc[int(table.score.abs().argmax())]
    edge = found.top(1)[0]
    assert (row.sender, row.receiver, row.score) == (edge.sender.kind, edge.receiver.kind, edge.score)
    assert found.plot().get_ylabel() == "sender"
    assert len(scored(M.decoder("llama"), positions="all").to_dataframe()) == found.edges * len(CLEAN)
