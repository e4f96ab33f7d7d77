"""Runs as CUDA graphs, by a stand-in for them on the CPU: it launches again what was launched, and nothing else."""

from __future__ import annotations

import copy
import pickle
import random

import models as M
import numpy as np
import pytest
import stand_in
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rmfast
from rmfast import RewardModel
from rmfast.engine import graphs
from rmfast.engine.planner import plan
from rmfast.engine.shapes import Shape, arrays
from rmfast.last_token import LastTokenRuns
from rmfast.patching.activations import collect

CPU = torch.device("cpu")


@pytest.fixture
def made(monkeypatch):
    return stand_in.on_the_cpu(monkeypatch)


def texts(count: int, seed: int) -> list[list[int]]:
    """Pairs that share their prompt, texts that begin others, duplicates, single tokens."""
    rng = random.Random(seed)
    out: list[list[int]] = []
    while len(out) < count:
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 9, 20, 40]))]
        answers = [[rng.randrange(256) for _ in range(rng.choice([0, 1, 5, 30]))] for _ in range(rng.choice([1, 2, 4]))]
        out += [prompt + answer for answer in answers]
    out = out[:count]
    rng.shuffle(out)
    return out


def pair(family: str, **options) -> tuple[RewardModel, RewardModel]:
    """A model without graphs and with them."""
    model = M.decoder(family)
    return RewardModel(model, **options), RewardModel(model, cuda_graphs=True, **options)


def warmed():
    """As `pair`, and texts of which the second has a graph."""
    plain, captured = pair("llama")
    some = texts(9, 1)
    for _ in range(3):
        captured.score(some)
    return plain, captured, some


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2", "phi3"])
def test_rewards_and_values_have_the_bits_of_runs_without_graphs(family, made):
    plain, captured = pair(family)
    for seed in range(6):
        some = texts(12, seed)
        for budget in (None, 70, 150):
            assert torch.equal(captured.score(some, batch_tokens=budget), plain.score(some, batch_tokens=budget))
        assert all(map(torch.equal, captured.token_values(some), plain.token_values(some)))
        positions = [random.Random(seed).randrange(len(text)) for text in some]
        assert torch.equal(captured.score(some, positions=positions), plain.score(some, positions=positions))
    assert len(made) < sum(graph.replays for graph in made) / 3  # most chunks had a shape that others had


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.sampled_from([None, 16, 64, 300]))
def test_no_batch_moves_a_bit(seed, count, budget):
    with pytest.MonkeyPatch.context() as patch:
        stand_in.on_the_cpu(patch)
        plain, captured = shared_models()
        some = texts(count, seed)
        assert torch.equal(captured.score(some, batch_tokens=budget), plain.score(some))


def shared_models(found: list = []) -> tuple[RewardModel, RewardModel]:  # noqa: B006
    if not found:
        found.extend(pair("llama"))
    return found[0], found[1]


@pytest.mark.parametrize("keep", [0, None])
def test_states_of_a_chunk_stay_when_others_run_and_chunks_with_kept_rows_run_without(keep, made):
    some = [text for text in texts(60, 4) if len(text) > 1]
    ids, cu = np.concatenate(some).astype(np.int32), np.cumsum([0, *map(len, some)])
    planned = plan(ids, cu, batch_tokens=64, keep_tokens=keep, min_shared=2)
    runs = []
    for rm in pair("llama"):
        engine = rm.packed_engine()
        with rm.binding.session():
            runs.append([hidden[: len(chunk.read_rows)] for chunk, hidden in engine.run(ids, planned, 0)])
    assert len(planned) > 8 and any(len(chunk.keep_rows) for chunk in planned) == (keep is None)
    assert made or keep is None
    assert all(map(torch.equal, *runs))


def test_one_text_of_each_length(made):
    plain, captured = shared_models()
    for length in [*range(1, 70), *range(60, 70), 96, 112, 127, 128]:
        text = M.token_ids([length], length)
        assert torch.equal(captured.score(text), plain.score(text)), length


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_runs_that_promise_no_bits_differ_by_rounding(dtype, made):
    model = M.decoder("llama").to(dtype)
    some = texts(12, 3)
    captured = RewardModel(model, cuda_graphs=True, invariant=False)
    for _ in range(3):
        M.assert_rewards(captured.score(some), RewardModel(model).score(some), M.reward_scale(model))
    assert made[-1].replays


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.sampled_from([8, 64, 300]),
    st.sampled_from([1, 8, 128]),
    st.booleans(),
)
def test_arrays_have_their_shape_and_rows_of_padding_are_suffixes_that_nobody_sees(seed, count, budget, tile, every):
    some = texts(count, seed)
    ids, cu = np.concatenate(some).astype(np.int32), np.cumsum([0, *map(len, some)])
    for chunk in plan(ids, cu, batch_tokens=budget, keep_tokens=0, min_shared=2, read="all" if every else "last"):
        assert chunk.kept == len(chunk.keep_rows) == 0
        for shape in (Shape.rounded(chunk, tile), Shape.of(chunk, tile)):
            ends, start, length, tokens, positions, pool, _, *read = arrays(ids, chunk, shape)
            assert len(tokens) == len(positions) == shape.rows and len(pool) == shape.pool
            assert len(ends) - 1 == len(start) == len(length) == shape.suffixes and shape.rows % tile == 0
            assert ends[-1] == shape.rows and (np.diff(ends) >= 0).all()
            own = len(chunk.prefix_len)
            assert (ends[: own + 1] == chunk.cu_seqlens).all() and not length[own:].any()
            assert (tokens[: chunk.rows] == ids[chunk.tokens]).all() and (pool < chunk.rows).all()
            if shape.reads is None:
                assert not read and len(chunk.read_rows) == chunk.rows
                continue
            rows, asks = read
            assert len(rows) == shape.reads == asks[-1] and shape.reads % tile == 0 and (np.diff(rows) > 0).all()
            assert (rows[: len(chunk.read_rows)] == chunk.read_rows).all() and rows[-1] < shape.rows
            for s in range(own, shape.suffixes):  # the last rows of each
                mine = rows[asks[s] : asks[s + 1]]
                assert (mine == np.arange(ends[s + 1] - len(mine), ends[s + 1])).all() and len(mine) <= ends[
                    s + 1
                ] - ends[s]


def test_a_full_budget_s_chunks_have_few_shapes_and_little_padding():
    rng = np.random.default_rng(0)
    shapes, rows, padded = set(), 0, 0
    some = [rng.integers(0, 30000, n) for n in rng.integers(50, 600, 4000)]
    some = [text for i in range(0, len(some), 2) for text in (some[i], np.append(some[i][:40], some[i + 1]))]
    ids, cu = np.concatenate(some).astype(np.int32), np.cumsum([0, *map(len, some)])
    planned = plan(ids, cu, batch_tokens=16384, keep_tokens=0)
    for chunk in planned:
        shape = Shape.rounded(chunk, 1)
        shapes.add(shape)
        rows, padded = rows + chunk.rows, padded + shape.rows
    assert len(planned) > 60 and len(shapes) <= 12 and padded < 1.08 * rows


def test_a_plan_without_kept_rows_runs_few_rows_twice():
    some = texts(400, 0)
    ids, cu = np.concatenate(some).astype(np.int32), np.cumsum([0, *map(len, some)])
    kept, alone = (plan(ids, cu, batch_tokens=1024, keep_tokens=keep).stats.rows for keep in (None, 0))
    assert kept <= alone < 1.02 * kept


def test_a_graph_launches_what_was_captured_on_what_its_buffer_holds_now(made):
    held, shape = graphs.Graphs([]), Shape(4, 1, 0, None)
    scale = [2.0]
    outs = [held.run(shape, [np.arange(4.0) + i], CPU, lambda x: x[0] * scale[0] + 1).tolist() for i in range(2)]
    scale[0] = 3.0  # what the host does is not in the graph
    outs.append(held.run(shape, [np.arange(4.0) + 2], CPU, lambda x: x[0] * 0).tolist())
    assert outs == [[2 * (i + j) + 1 for j in range(4)] for i in range(3)] and made[0].replays == 2
    with pytest.raises(ValueError, match=r"Expected torch.float64 of shape \(4,\), got torch.float64 of \(5,\)"):
        held.run(shape, [np.arange(5.0)], CPU, lambda x: x[0])


def test_what_reads_on_the_host_is_refused_as_it_is_captured(made):
    held, shape = graphs.Graphs([]), Shape(4, 1, 0, None)
    held.run(shape, [np.arange(4.0)], CPU, lambda x: x[0] * x[0].sum().item())
    with pytest.raises(RuntimeError, match=r"Expected cuda_graphs=False: .* in a graph: aten\._local_scalar"):
        held.run(shape, [np.arange(4.0)], CPU, lambda x: x[0] * x[0].sum().item())


def test_a_first_run_that_fails_half_way_is_no_first_run(made):
    """Kernels that it did not reach are not compiled, which a capture can't do."""
    held, shape = graphs.Graphs([]), Shape(4, 1, 0, None)

    def fails(arrays):
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        held.run(shape, [np.arange(4.0)], CPU, fails)
    for count in (0, 1):
        assert held.run(shape, [np.arange(4.0)], CPU, lambda x: x[0] + 1).tolist() == [1, 2, 3, 4]
        assert len(made) == count


def test_memory_that_runs_out_in_a_capture_is_told_also_where_its_end_fails(made, monkeypatch):
    held, shape = graphs.Graphs([]), Shape(4, 1, 0, None)

    def full(arrays):
        raise torch.OutOfMemoryError("out of memory")

    def ends(self, *error):
        stand_in.Capture.under_way -= 1
        TorchDispatchMode.__exit__(self, *error)
        raise RuntimeError("operation failed due to a previous error during capture")

    held.run(shape, [np.arange(4.0)], CPU, lambda x: x[0] + 1)
    monkeypatch.setattr(stand_in.Capture, "__exit__", ends)
    with pytest.raises(torch.OutOfMemoryError):
        held.run(shape, [np.arange(4.0)], CPU, full)
    assert not held._held
    assert torch.cuda.current_stream(CPU).cuda_stream == 0


def test_the_oldest_of_too_many_graphs_goes(made, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST", 2)
    held = graphs.Graphs([])
    for rows in (1, 2, 1, 3, 1, 2):
        held.run(Shape(rows, 1, 0, None), [np.arange(float(rows))], CPU, lambda x: x[0] + 1)
    assert [shape.rows for shape in held._held] == [1, 2] and len(made) == 1 and made[0].replays == 2


def test_weights_that_change_where_they_lie_are_seen_and_others_are_captured_anew(made):
    plain, captured, some = warmed()
    count, weight = len(made), captured.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(1.5)
    assert torch.equal(captured.score(some), plain.score(some)) and len(made) == count
    weight.data = weight.data * 1.5
    for _ in range(3):
        assert torch.equal(captured.score(some), plain.score(some))
    assert len(made) > count


def test_what_modules_beside_the_layers_are_set_to_is_seen(made):
    """The factor of YaRN's cosines is a number on the host, of which a graph holds what it was."""
    plain, captured, some = warmed()
    captured.model.model.rotary_emb.attention_scaling = 1.5
    for _ in range(3):
        assert torch.equal(captured.score(some), plain.score(some))
    assert made[-1].replays
    other = copy.deepcopy(captured)
    other.model.model.rotary_emb.attention_scaling = 0.5
    assert torch.equal(other.score(some), RewardModel(other.model).score(some))
    assert torch.equal(captured.score(some), plain.score(some))


def test_another_backend_is_captured_anew(made):
    plain, captured, some = warmed()
    count = len(made)
    with rmfast.backend("eager"):
        for _ in range(2):
            M.assert_rewards(captured.score(some), plain.score(some), M.reward_scale(plain.model))
    assert len(made) > count


def test_other_weights_have_graphs_of_their_own(made):
    plain, captured, some = warmed()
    other = copy.deepcopy(captured)
    with torch.no_grad():
        other.model.model.layers[1].mlp.up_proj.weight.mul_(3)
    for _ in range(3):
        changed = other.score(some)
    assert torch.equal(captured.score(some), plain.score(some)) and not torch.equal(changed, plain.score(some))
    assert torch.equal(changed, RewardModel(other.model).score(some))


def test_what_holds_an_engine_is_copied_and_pickled_without_its_graphs(made):
    plain, captured, some = warmed()
    runs = LastTokenRuns(captured, some)
    assert torch.equal(copy.deepcopy(runs).rewards(), runs.rewards())
    elsewhere, kept = pickle.loads(pickle.dumps((captured, runs)))
    with pytest.raises(ValueError, match="Make LastTokenRuns anew"):  # keys and values of another process' weights
        kept.rewards()
    for rm in (copy.deepcopy(captured), elsewhere):
        for _ in range(3):
            assert torch.equal(rm.score(some), plain.score(some))


def test_clamps_that_are_folded_into_weights_are_captured(made):
    clamp = rmfast.NeuronClamp({"model.layers.1.mlp.up_proj": ([3, 5], [0.5, -1.0])}, "all")
    plain, captured = (rm.with_interventions(clamp) for rm in pair("llama"))
    some = texts(9, 1)
    for _ in range(3):
        assert torch.equal(captured.score(some), plain.score(some))
    assert made and made[-1].replays


def test_memory_that_runs_out_halves_the_batch_and_drops_the_graphs(made, monkeypatch):
    plain, captured = pair("llama")
    some, least = texts(20, 2), []
    body = type(captured.packed_engine()).body

    def limited(self, tokens, *args):
        least.append(len(tokens))
        if len(tokens) > 128:
            raise torch.OutOfMemoryError("out of memory")
        return body(self, tokens, *args)

    monkeypatch.setattr(type(captured.packed_engine()), "body", limited)
    for _ in range(3):
        assert torch.equal(captured.score(some, batch_tokens=512), plain.score(some, batch_tokens=100))
    assert max(least) > 128 and made[-1].replays


def test_what_watches_layers_sees_each_run_and_no_graph_is_replayed(made):
    """A replay calls no hook: what it should have shown would be that of a chunk before."""
    plain, captured = pair("llama")
    some = texts(20, 5)
    for _ in range(3):
        captured.score(some, batch_tokens=64)
    replays = sum(graph.replays for graph in made)
    for budget in (64, None):
        lenses = [rm.lens(some, batch_tokens=budget).rewards for rm in (plain, captured)]
        assert torch.equal(*lenses)
        for site in ("resid_pre", "resid_post", "attn_out"):
            rows = [collect(rm, some, layer=0, site=site, batch_tokens=budget).rows for rm in (plain, captured)]
            assert torch.equal(*rows), site
    assert sum(graph.replays for graph in made) == replays


def clamped(model):
    clamp = rmfast.NeuronClamp({"model.layers.1.mlp.up_proj": ([3], [0.5])}, "last")
    return RewardModel(model, cuda_graphs=True).with_interventions(clamp)


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return RewardModel(model, cuda_graphs=True)


def adapted(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    return RewardModel(get_peft_model(model, config), cuda_graphs=True)


def compiled(model):
    model.model.layers[0].mlp.compile()
    return RewardModel(model, cuda_graphs=True, compute="native")  # in fp32 what is compiled does not run


def packed(model):
    class Packed(nn.Parameter):
        """What torchao puts in a weight's place."""

    projection = model.model.layers[1].mlp.down_proj
    projection.weight = Packed(projection.weight.data)
    return RewardModel(model, cuda_graphs=True)


def made_of(model):
    return RewardModel(model, cuda_graphs=True)


REFUSED = [
    ("llama", clamped, "clamps set values inside of its layers"),
    ("llama", hooked, r"padded runs have a shape each \(not packed: hooks \(on layers.0\) expect padded batches\)"),
    ("llama", adapted, "a projection is peft's Linear, whose runs may differ"),
    ("llama", packed, "a projection is torch's Linear, whose runs may differ"),
    ("llama", compiled, r"it is compiled \(model.compile\(\)\)"),
    ("mixtral", made_of, "its MixtralSparseMoeBlock runs as the module that it is"),
    ("phi3-longrope", made_of, "its rotary embeddings, or its batches, go by the length of a text"),
    ("bloom", made_of, "its layers run as the model's own modules"),
]


@pytest.mark.parametrize("family, make, why", REFUSED, ids=lambda x: getattr(x, "__name__", x))
def test_what_can_t_be_captured_is_refused_by_name(family, make, why, made):
    rm = make(M.decoder(family))
    with pytest.raises(ValueError, match=f"Expected cuda_graphs=False: {why}"):
        rm.score([[1, 2], [3]])
    assert "CUDA graphs: no run, since " in rm.explain() and not made


def test_devices_and_padded_runs_are_refused_by_name(monkeypatch):
    rm = RewardModel(M.decoder("llama"), cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs=False: CUDA graphs are for CUDA devices, and the model is on"):
        rm.score([[1, 2]])
    assert "CUDA graphs: no run, since CUDA graphs are for CUDA devices" in rm.explain()
    stand_in.on_the_cpu(monkeypatch)
    with pytest.raises(ValueError, match="Expected cuda_graphs=False: padded runs have a shape each"):
        rm.score([[1, 2]], engine="padded")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="RMFAST_CHECK=1 reads values on the host"):
        patch.setenv("RMFAST_CHECK", "1")
        rm.score([[1, 2]])
    runs = rmfast.backends.runs
    monkeypatch.setattr(rmfast.backends, "runs", lambda op, on: "varlen" if op == "suffix_attention" else runs(op, on))
    with pytest.raises(ValueError, match="varlen_attn is given lengths that are read on the host"):
        rm.score([[1, 2]])


def test_graphs_run_only_where_they_are_asked_for_and_explain_says_so(made):
    plain, captured = pair("llama")
    assert "CUDA graphs: one for each shape of chunk" in captured.explain() and "CUDA graphs" not in plain.explain()
    some = texts(9, 1)
    count = len(made)  # the self-test of bits has made some
    assert [plain.score(some) is not None for _ in range(3)] and len(made) == count
    with pytest.raises(TypeError, match="Expected cuda_graphs to be True or False, got 'yes'"):
        RewardModel(M.decoder("llama"), cuda_graphs="yes")


def test_a_projection_that_takes_another_s_place_is_seen(made):
    plain, captured, some = warmed()
    mlp = captured.model.model.layers[0].mlp
    mlp.up_proj = nn.Linear(48, 80, bias=False)
    for _ in range(3):
        assert torch.equal(captured.score(some), plain.score(some))
