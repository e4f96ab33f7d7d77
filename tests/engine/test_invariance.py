"""The same bits in any batch: texts alone and in company, for every way in which rows run."""

from __future__ import annotations

import random

import models as M
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rmfast
from rmfast import RewardModel
from rmfast.engine import invariance
from rmfast.last_token import LastTokenRuns

FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "phi3", "phi3-longrope", "gpt2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def texts(count: int, seed: int = 0) -> list[list[int]]:
    """Token ids of up to 100 tokens, most of which share a beginning with others."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(256) for _ in range(rng.randrange(1, 90))] for _ in range(max(1, count // 4))]
    return [
        (prompt := rng.choice(prompts))[: rng.randrange(len(prompt) + 1)]
        + [rng.randrange(256) for _ in range(rng.randrange(1, 12))]
        for _ in range(count)
    ]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compute", ["native", "fp32"])
def test_rewards_and_values_have_the_bits_that_their_text_has_alone(family, dtype, threads, compute):
    rm = RewardModel(M.decoder(family, num_labels=3).to(dtype), invariant=True, compute=compute)
    some = texts(13)
    assert rm.moves() is None, rm.moves()
    alone = torch.cat([rm.score([text]) for text in some])
    values = [rm.token_values([text])[0] for text in some]
    for budget in (None, 40):
        assert torch.equal(rm.score(some, batch_tokens=budget), alone)
        assert torch.equal(rm.score(some[::-1], batch_tokens=budget).flip(0), alone)
        assert all(map(torch.equal, rm.token_values(some, batch_tokens=budget), values))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cuda", "a tile of the CUDA kernel holds rows of several texts"),
        ("varlen", "torch's varlen_attn promises no bits"),
    ],
)
def test_some_kernels_of_attention_promise_no_bits(name, why, monkeypatch):
    rm = RewardModel(M.decoder("llama"), invariant=True)
    engine = rm.packed_engine()
    assert engine.moves() is None
    runs = rmfast.backends.runs
    monkeypatch.setattr(rmfast.backends, "runs", lambda op, on: name if op == "suffix_attention" else runs(op, on))
    assert engine.moves() == why


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.sampled_from([None, 16, 64, 300]))
def test_no_batch_moves_a_bit(seed, count, budget):
    rm, some = shared_model(), texts(count, seed)
    which = random.Random(seed).sample(range(count), random.Random(seed).randrange(1, count + 1))
    every = rm.score(some, batch_tokens=budget)
    assert torch.equal(rm.score([some[i] for i in which]), every[which])
    assert torch.equal(rm.score([some[which[0]]]), every[which[:1]])


def shared_model(found: list = []) -> RewardModel:  # noqa: B006
    if not found:
        found.append(RewardModel(M.decoder("llama")))
    return found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_reruns_of_the_last_token_have_the_bits_of_scores(family, dtype):
    rm, some = RewardModel(M.decoder(family).to(dtype)), texts(9)
    want = rm.score(some)
    assert torch.equal(LastTokenRuns(rm, some).rewards()[:, 0], want)
    assert all(torch.equal(LastTokenRuns(rm, [text]).rewards()[0], want[i : i + 1]) for i, text in enumerate(some))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sites", ["resid_pre", "resid_post", "resid_mid", "attn_out", "mlp_out", "head_out", "q", "k", "v"]
)
def test_a_cell_of_a_sweep_is_the_same_whatever_else_is_swept(sites, dtype):
    rm, rng = RewardModel(M.decoder("llama").to(dtype)), random.Random(0)
    clean = [rng.randrange(256) for _ in range(30)]
    corrupted = clean[:4] + [rng.randrange(256) for _ in range(26)]
    whole = rm.patch_sweep(clean, corrupted, sites=sites)
    for layers, positions, budget in (([0, 1], [29], None), ([1], [5, 6, 20], None), ([0], list(range(3, 30)), 64)):
        some = rm.patch_sweep(clean, corrupted, sites=sites, layers=layers, positions=positions, batch_tokens=budget)
        assert torch.equal(some.rewards, whole.rewards[layers][:, positions])


def test_rewards_under_interventions_keep_their_bits():
    rm, some = RewardModel(M.decoder("llama")), texts(7)
    clamp = rmfast.NeuronClamp({"model.layers.1.mlp.up_proj": ([3, 5], [0.5, -1.0])}, "last")
    under = rm.with_interventions(clamp, rmfast.DirectionRemoval(torch.eye(48)[:2]))
    assert torch.equal(under.score(some), torch.stack([under.score([text])[0] for text in some]))


@given(st.integers(1, 500), st.integers(0, 500), st.sampled_from([1, 8, 16, 128]))
def test_padding_makes_whole_tiles_of_rows_and_of_those_that_are_read(rows, reads, tile):
    reads = min(rows, reads)
    more, more_reads = invariance.padding(rows, reads, tile)
    assert (rows + more) % tile == 0 == (reads + more_reads) % tile and more_reads <= more < 2 * tile
    assert reads + more_reads > 0
    more, more_reads = invariance.padding(rows, None, tile)
    assert (rows + more) % tile == 0 and more == more_reads < tile
    padded = invariance.padded(np.arange(5, 5 + rows), tile)
    assert len(padded) % tile == 0 and (padded[:rows] == np.arange(5, 5 + rows)).all() and (padded[rows:] == 5).all()


@pytest.mark.parametrize("edge, tile", [(1, 8), (8, 8), (12, None), (32, 32), (0, None)])
def test_the_self_test_finds_the_rows_that_a_matmul_treats_alike(edge, tile, monkeypatch):
    linear = nn.functional.linear

    def uneven(x, weight, bias=None):
        """Treats the rows behind the last whole `edge` otherwise, or all of them where `edge` is 0."""
        out, whole = linear(x, weight, bias), len(x) // edge * edge if edge else 0
        return torch.cat([out[:whole], out[whole:] * (1 + len(x) * 2.0**-20)])

    monkeypatch.setattr(invariance, "_found", {})
    monkeypatch.setattr(nn.functional, "linear", uneven)
    found = invariance.tile_of(nn.Sequential(nn.Linear(16, 8)))
    assert found == tile if tile else "8 × 16 in float32 depends on the others" in str(found)


def test_explain_says_what_is_promised():
    rm = RewardModel(M.decoder("llama"))
    assert "bits: the same in any batch" in rm.explain()
    with rmfast.backend("eager"):
        assert "bits: may move with the batch (eager attention" in rm.explain()
    assert "(it was not asked for" in RewardModel(M.decoder("llama"), invariant=False).explain()
    assert "bits: may move with the batch (padded runs" in RewardModel(M.encoder("Bert")).explain()


def test_what_can_t_be_promised_is_an_error_where_it_is_asked_for():
    rm = RewardModel(M.decoder("llama"), invariant=True)
    with pytest.raises(
        ValueError, match="Expected invariant=False: rewards may move with their batch here, padded runs"
    ):
        rm.score([[1, 2]], engine="padded")
    with rmfast.backend("eager"), pytest.raises(ValueError, match="eager attention"):
        rm.score([[1, 2]])
    with pytest.raises(ValueError, match="padded runs: it"):
        RewardModel(M.encoder("Bert"), invariant=True).score([[1, 2]])


USES = {
    "score": lambda rm: rm.score([[1, 2], [3]]),
    "values": lambda rm: rm.token_values([[1, 2], [3]]),
    "lens": lambda rm: rm.lens([[1, 2], [3]]),
    "attribute": lambda rm: rm.attribute([[1, 2], [3]]),
    "sweep": lambda rm: rm.patch_sweep([1, 2, 3], [1, 4, 3]),
    "last token": lambda rm: LastTokenRuns(rm, [[1, 2], [3]]).rewards(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_no_workload_runs_what_can_t_be_promised(use):
    model = M.decoder("llama")
    rm = RewardModel(model, invariant=True)
    use(rm)
    with rmfast.backend("eager"), pytest.raises(ValueError, match="may move with their batch here, eager attention"):
        use(rm)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="may move with their batch here, padded runs"):
        use(rm)


def test_reruns_of_the_last_token_ask_anew_which_backend_runs():
    runs = LastTokenRuns(RewardModel(M.decoder("llama"), invariant=True), [[1, 2], [3]])
    with rmfast.backend("eager"), pytest.raises(ValueError, match="eager attention"):
        runs.rewards()
