"""Circuits: how they are chosen, and runs of them against sums of senders written out (plain_edges.py)."""

from __future__ import annotations

import copy

import families
import models as M
import numpy as np
import oracle as O
import plain_edges as P
import pytest
import torch

import rmfast
from rmfast.circuits import ablation
from rmfast.circuits.circuit import Circuit, circuit
from rmfast.circuits.edges import edge_attribution
from rmfast.circuits.faithfulness import faithfulness
from rmfast.circuits.nodes import Node
from rmfast.circuits.scores import Edge

CLEAN, OTHER = M.token_ids([8, 8], seed=3)
MAKERS = {
    **{name: (lambda name=name: M.decoder(name)) for name in ("llama", "qwen3", "gemma2", "gpt2")},
    **{name: (lambda name=name: families.model(name)) for name in ("neox", "phi")},
}


@pytest.fixture
def fp64():
    with O.everything_in_fp64():
        yield


def every_edge(scores) -> list[Edge]:
    return scores.top(scores.edges)


def random_circuit(scores, share: float, seed: int) -> Circuit:
    rng = np.random.default_rng(seed)
    return Circuit(tuple(edge for edge in every_edge(scores) if rng.random() < share))


def kept(circuit: Circuit) -> set:
    return {edge[:2] for edge in circuit.edges}


@pytest.mark.parametrize("family", MAKERS)
def test_circuits_run_as_with_plain_hooks(family, fp64):
    model = MAKERS[family]().double()
    rm = rmfast.RewardModel(model)
    scores = edge_attribution(rm, CLEAN, OTHER)
    circuits = [random_circuit(scores, share, seed) for seed, share in enumerate((0.2, 0.6))]
    got = faithfulness(rm, [*circuits, Circuit(tuple(every_edge(scores)))], CLEAN, OTHER)
    (_, clean), (other, corrupted) = P.written(model, CLEAN), P.written(model, OTHER)
    rest, every = P.biases(model), kept(Circuit(tuple(every_edge(scores))))
    for i, each in enumerate(circuits):
        for numbers, edges in ((got.circuit, kept(each)), (got.rest, every - kept(each))):
            want = P.ablated(model, CLEAN, other, rest, edges)
            assert numbers[i, 0] == pytest.approx(float(want[0]), rel=1e-9, abs=1e-9)
    assert got.circuit[2, 0] == pytest.approx(float(clean[0]), rel=1e-9)
    assert got.none[0] == pytest.approx(float(corrupted[0]), rel=1e-9)
    assert got.model[0] == pytest.approx(float(clean[0]), rel=1e-9)
    assert got.shares[2].faithfulness == pytest.approx(1)
    assert got.shares[2].left == pytest.approx(0, abs=1e-9)


def test_mean_ablation_is_of_all_tokens_of_the_baseline(fp64):
    model = M.decoder("gemma2").double()
    rm, texts = rmfast.RewardModel(model), M.token_ids([6, 9], seed=8)
    scores = edge_attribution(rm, CLEAN, OTHER)
    some = random_circuit(scores, 0.5, 0)
    got = faithfulness(rm, some, CLEAN, ablation="mean", baseline=texts)
    each = [P.written(model, text)[0] for text in texts]
    mean = {u: torch.cat([found[u] for found in each]).mean(0).expand(len(CLEAN), -1) for u in each[0]}
    want = [P.ablated(model, CLEAN, mean, P.biases(model), edges) for edges in (kept(some), set())]
    np.testing.assert_allclose([got.circuit[0, 0], got.none[0]], [float(x[0]) for x in want], rtol=1e-9)


def test_batches_of_circuits_change_nothing(fp64, monkeypatch):
    rm = rmfast.RewardModel(M.decoder("llama").double())
    scores = edge_attribution(rm, CLEAN, OTHER)
    circuits = [random_circuit(scores, 0.5, seed) for seed in range(3)]
    want = faithfulness(rm, circuits, CLEAN, OTHER)
    monkeypatch.setattr(ablation, "_ROWS", 2 * len(CLEAN))
    got = faithfulness(rm, circuits, CLEAN, OTHER)
    np.testing.assert_allclose(got.circuit, want.circuit, rtol=1e-12)


def test_models_stored_in_16_bits_run_in_fp32():
    stored = M.decoder("gpt2").bfloat16()
    wide = copy.deepcopy(stored).float()
    some = random_circuit(edge_attribution(rmfast.RewardModel(wide), CLEAN, OTHER), 0.5, 0)
    got, want = (faithfulness(rmfast.RewardModel(model), some, CLEAN, OTHER) for model in (stored, wide))
    np.testing.assert_allclose(got.circuit, want.circuit, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_edges_that_no_path_is_on_change_nothing(family, fp64):
    rm = rmfast.RewardModel(MAKERS[family]().double())
    scores = edge_attribution(rm, CLEAN, OTHER)
    for n in (5, 15, 40):
        top = Circuit(tuple(scores.top(n)))
        pruned = circuit(scores, n)
        assert kept(pruned) <= kept(top)
        got = faithfulness(rm, [top, pruned], CLEAN, OTHER).circuit[:, 0]
        assert got[0] == pytest.approx(got[1], rel=1e-9)


def test_greedy_circuits_grow_from_the_reward():
    scores = edge_attribution(rmfast.RewardModel(M.decoder("llama")), CLEAN, OTHER)
    strongest = scores.senders[int(scores.joint[:, -1].abs().argmax())]
    assert len(circuit(scores, 1, "greedy")) == (strongest == Node("embedding"))  # others read nothing yet
    sizes = [len(circuit(scores, n, "greedy")) for n in (0, 10, 40, scores.edges, 10**6)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == scores.edges
    for edge in circuit(scores, 40, "greedy").edges:
        assert scores[edge[:2]] == edge.score


def planted_scores():
    """Of a model with one query head to a K/V head, its scores set by hand."""
    scores = edge_attribution(rmfast.RewardModel(M.decoder("llama", num_key_value_heads=4)), CLEAN, OTHER)
    scores.scores = scores.scores.masked_fill(~scores.scores.isnan(), 0.0)
    return scores


def test_dead_ends_are_taken_out_both_ways():
    scores = planted_scores()
    wanted = [
        (Node("embedding"), Node("k_input", 0, 2)),
        (Node("head_out", 0, 2), Node("mlp_input", 0)),
        (Node("mlp_out", 0), Node("reward")),
        (Node("embedding"), Node("q_input", 1, 0)),  # of a head that nobody reads
        (Node("head_out", 1, 1), Node("reward")),  # of one that reads nothing
    ]
    for place, (u, v) in enumerate(wanted):
        scores.scores[scores.senders.index(u), scores.receivers.index(v)] = 5.0 - place
    assert kept(circuit(scores, 5)) == set(wanted[:3])
    assert kept(circuit(scores, 4, "greedy")) == set(wanted[:3])
    assert circuit(scores, 5).nodes[:2] == [Node("embedding"), Node("k_input", 0, 2)]


def test_groups_of_query_heads_share_what_their_keys_read():
    scores = edge_attribution(rmfast.RewardModel(M.decoder("llama")), CLEAN, OTHER)  # 4 heads, 2 of keys
    scores.scores = scores.scores.masked_fill(~scores.scores.isnan(), 0.0)
    path = [(Node("embedding"), Node("k_input", 0, 1)), (Node("head_out", 0, 3), Node("reward"))]
    for u, v in path:
        scores.scores[scores.senders.index(u), scores.receivers.index(v)] = 1.0
    assert kept(circuit(scores, 2)) == set(path)


def test_shares_have_intervals_over_prompts():
    rm = rmfast.RewardModel(M.decoder("llama"))
    texts = M.token_ids([7] * 12, seed=5)
    clean, corrupted = texts[::2], texts[1::2]
    scores = edge_attribution(rm, clean, corrupted)
    circuits = [circuit(scores, n) for n in (20, 60, scores.edges)]
    got = faithfulness(rm, circuits, clean, corrupted, resamples=200)
    assert got.circuit.shape == (3, 6)
    for i, share in enumerate(got.shares):
        gap = got.model.sum() - got.none.sum()
        assert share.faithfulness == pytest.approx((got.circuit[i].sum() - got.none.sum()) / gap)
        assert share.left == pytest.approx((got.rest[i].sum() - got.none.sum()) / gap)
        assert share.low <= share.high
    assert got.shares[-1].low == pytest.approx(1, abs=1e-3)
    one = faithfulness(rm, circuits[0], clean, corrupted, prompts=["same"] * 6, resamples=50).shares[0]
    assert one.low == pytest.approx(one.faithfulness) == pytest.approx(one.high)
    assert "left without it" in str(got)


def test_without_a_gap_there_are_no_shares():
    rm = rmfast.RewardModel(M.decoder("llama"))
    two = [CLEAN, OTHER], [OTHER, CLEAN]  # whose gaps cancel
    share = faithfulness(rm, circuit(edge_attribution(rm, *two), 20), *two, resamples=5).shares[0]
    assert np.isnan([share.faithfulness, share.left, share.low, share.high]).all()


def test_a_layer_norm_behind_attention_centres_what_heads_write(fp64):
    """Before its gain, and not behind it: with no edges a run is the corrupted one."""
    model = M.decoder("gemma2").double()
    for i, block in enumerate(model.model.layers):
        norm = torch.nn.LayerNorm(48, bias=False).double()
        torch.nn.init.uniform_(norm.weight, 0.3, 2.0, generator=torch.Generator().manual_seed(i))
        block.post_attention_layernorm = norm
    rm = rmfast.RewardModel(model)
    scores = edge_attribution(rm, CLEAN, OTHER, steps=48)
    assert float(scores.scores[0].nansum()) == pytest.approx(scores.corrupted - scores.clean, rel=0.01)
    got = faithfulness(rm, Circuit(tuple(every_edge(scores))), CLEAN, OTHER)
    assert got.circuit[0, 0] == pytest.approx(got.model[0], rel=1e-9)
    assert [got.none[0], got.rest[0, 0]] == pytest.approx([scores.corrupted] * 2, rel=1e-9)


def test_arguments_are_checked():
    rm = rmfast.RewardModel(M.decoder("llama"))
    scores = edge_attribution(rm, CLEAN, OTHER)
    other = Circuit((Edge(Node("mlp_out", 7), Node("reward")),))
    with pytest.raises(ValueError, match="Expected edges between senders and receivers of this model"):
        faithfulness(rm, other, CLEAN, OTHER)
    backwards = Circuit((Edge(Node("mlp_out", 1), Node("q_input", 0, 0)),))
    with pytest.raises(ValueError, match=r"Expected circuits of edges .* got mlp_out\[1\] -> q_input\[0, 0\]"):
        faithfulness(rm, [circuit(scores, 5), backwards], CLEAN, OTHER)
    with pytest.raises(ValueError, match="Expected circuits to hold at least one"):
        faithfulness(rm, [], CLEAN, OTHER)
    with pytest.raises(ValueError, match="Expected baseline"):
        faithfulness(rm, circuit(scores, 5), CLEAN, ablation="mean")
    with pytest.raises(ValueError, match="Expected align to give a token of the clean text a partner"):
        faithfulness(rm, circuit(scores, 5), CLEAN, OTHER, align={})
    with pytest.raises(ValueError, match="Expected align"):
        faithfulness(rm, circuit(scores, 5), CLEAN, ablation="mean", baseline=[OTHER], align="strict")
    with pytest.raises(ValueError, match="Expected method"):
        circuit(scores, 5, "best")


def test_circuits_are_shown_and_kept(tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    rm = rmfast.RewardModel(M.decoder("llama"))
    found = circuit(edge_attribution(rm, CLEAN, OTHER), 30)
    found.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json").edges == found.edges
    with pytest.raises(ValueError, match=r"Expected a file that Circuit\.save wrote"):
        Circuit.load(tmp_path / "none.json")
    assert str(found.edges[0]) in str(found)
    assert len(found.to_dataframe()) == len(found)
    assert "<img" in found._repr_html_()
    got = faithfulness(rm, found, CLEAN, OTHER)
    got.save(tmp_path / "shares.json")
    assert list(got.to_dataframe().edges) == [len(found)]
    assert got.plot().get_xlabel() == "edges"
