"""patch_sweep against plain forward hooks on the unmodified model, one edit a forward (tests/oracle.py)."""

from __future__ import annotations

import itertools
import random
import re

import models as M
import numpy as np
import oracle
import pytest
import torch
import transformers
from scipy.stats import spearmanr

import rmfast
from rmfast.patching.pairs import align_tokens, aligned
from rmfast.patching.patcher import patcher_of
from rmfast.patching.sites import KINDS, UNITS
from rmfast.patching.suffix_chunk import Chunk

FAMILIES = [*M.DECODERS, "gpt2"]
UNITED = ("head_out", "mlp_neuron", "q", "k", "v")
NEURONS = [0, 3, 79]


def model(family, dtype=torch.float64, labels=1):
    return M.decoder(family, labels=labels, num_hidden_layers=3).to(dtype)


def pair(length=21, changed=(9, 10, 14), seed=3):
    clean = M.token_ids([length], seed)[0]
    corrupted = list(clean)
    for position in changed:
        corrupted[position] = (clean[position] + 17) % 256
    return clean, corrupted


def want(m, sweep, cell, base_ids, values, kind=None):
    """The oracle's reward at one cell, with values(kind, layer) (T, units, width)."""
    at = dict(zip(sweep.axes, cell))
    kind = kind or sweep.coords["site"][at["site"]]
    layer = sweep.coords["layer"][at["layer"]]
    positions = sweep.coords["position"][at["position"]]
    unit = next((sweep.coords[axis][at[axis]] for axis in ("head", "neuron", "unit") if axis in at), 0)
    new = values(kind, layer)[positions, unit]
    return oracle.oracle(m, base_ids, len(base_ids) - 1, kind, layer, positions, unit, new)


def check(m, sweep, base_ids, values, kind, cells=10, tolerance=1e-10, scale=1.0):
    every = list(itertools.product(*(range(n) for n in sweep.rewards.shape)))
    for cell in random.Random(0).sample(every, min(cells, len(every))):
        truth = want(m, sweep, cell, base_ids, values, kind)
        got = sweep.rewards[cell]
        assert abs(float(got - truth)) <= tolerance * max(scale, abs(float(truth))), (cell, float(got), float(truth))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["denoising", "noising"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family_is_what_one_hooked_forward_gives(family, mode, kind):
    m = model(family)
    clean, corrupted = pair()
    base, other = (clean, corrupted) if mode == "noising" else (corrupted, clean)
    neurons = {"neurons": NEURONS} if kind == "mlp_neuron" else {}
    with oracle.everything_in_fp64():
        sweep = rmfast.RewardModel(m).patch_sweep(clean, corrupted, mode=mode, sites=kind, **neurons)
        unit = (UNITS[kind],) if kind in UNITS else ()
        assert sweep.axes == ("layer", "position", *unit)
        check(m, sweep, base, lambda kind, layer: oracle.activation(m, other, kind, layer), kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_rewards_are_within_1e_5_of_the_reward_scale(family):
    m = model(family, torch.float32)
    clean, corrupted = pair()
    rm = rmfast.RewardModel(m)
    scale = M.reward_scale(m)
    for kind in KINDS:
        neurons = {"neurons": NEURONS} if kind == "mlp_neuron" else {}
        sweep = rm.patch_sweep(clean, corrupted, sites=kind, **neurons)
        check(m, sweep, corrupted, lambda kind, layer: oracle.activation(m, clean, kind, layer), kind, 5, 1e-5, scale)


def test_bf16_is_nearer_to_the_truth_than_hooks_in_bf16():
    errors, agreements = [], []
    for family, seed in itertools.product(("llama", "qwen3", "gemma2", "gemma3", "phi3"), range(2)):
        exact, rounded = model(family), model(family, torch.bfloat16)
        exact.load_state_dict(rounded.state_dict())
        clean, corrupted = pair(24, range(1, 24), seed)
        truth = rmfast.RewardModel(exact).patch_sweep(clean, corrupted, layers=[0, 1]).rewards[:, 1:]
        got = rmfast.RewardModel(rounded).patch_sweep(clean, corrupted, layers=[0, 1]).rewards[:, 1:].double()
        loop = torch.empty_like(truth)
        for layer in range(2):
            new = oracle.activation(rounded, clean, "resid_post", layer)[:, 0]
            for at in range(1, 24):
                reward = oracle.oracle(rounded, corrupted, 23, "resid_post", layer, [at], 0, new[[at]])
                loop[layer, at - 1] = reward
        errors.append([float((x - truth).abs().mean()) for x in (got, loop)])
        agreements.append([float(spearmanr(x.flatten(), truth.flatten()).statistic) for x in (got, loop)])
    # One text's turn on how the base run happens to be rounded, its ranks on close neighbours: judged on all.
    ours, theirs = np.mean(errors, 0)
    assert ours <= 0.8 * theirs
    ours, theirs = np.mean(agreements, 0)
    assert ours >= theirs


@pytest.mark.parametrize("positions", ["joint", [3, [9, 10], range(8, 15), slice(-4, None)]])
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "attn_out", "q", "v", "mlp_neuron"])
def test_groups_of_positions_are_replaced_together(kind, positions):
    m = model("qwen3")
    clean, corrupted = pair()
    more = {"neurons": NEURONS} if kind == "mlp_neuron" else {}
    with oracle.everything_in_fp64():
        sweep = rmfast.RewardModel(m).patch_sweep(clean, corrupted, sites=kind, positions=positions, **more)
        assert sweep.rewards.shape[1] == (1 if positions == "joint" else 4)
        check(m, sweep, corrupted, lambda kind, layer: oracle.activation(m, clean, kind, layer), kind)


def test_several_kinds_share_one_grid_padded_where_they_have_fewer_units():
    m = model("llama")
    clean, corrupted = pair()
    with oracle.everything_in_fp64():
        rm = rmfast.RewardModel(m)
        sweep = rm.patch_sweep(clean, corrupted, sites=["attn_out", "q", "k"], positions="joint")
        assert sweep.axes == ("site", "layer", "position", "unit") and sweep.rewards.shape == (3, 3, 1, 4)
        assert sweep.rewards[0, ..., 1:].isnan().all() and sweep.rewards[2, ..., 2:].isnan().all()
        for i, kind in enumerate(("attn_out", "q", "k")):
            alone = rm.patch_sweep(clean, corrupted, sites=kind, positions="joint").rewards.reshape(3, 1, -1)
            torch.testing.assert_close(sweep.rewards[i, ..., : alone.size(-1)], alone, rtol=1e-10, atol=1e-10)


def test_layers_heads_and_single_values_select_from_the_grid():
    m = model("llama")
    clean, corrupted = pair()
    rm = rmfast.RewardModel(m)
    whole = rm.patch_sweep(clean, corrupted, sites="head_out")
    some = rm.patch_sweep(clean, corrupted, sites="head_out", layers=[-1, 0], heads=2, positions=[12])
    assert some.coords == {"site": ["head_out"], "layer": [2, 0], "position": [[12]], "head": [2]}
    torch.testing.assert_close(some.rewards, whole.rewards[[2, 0]][:, [12]][:, :, [2]], rtol=1e-10, atol=1e-10)
    beside = rm.patch_sweep(clean, corrupted, sites=["attn_out", "head_out"], heads=[2, 1], positions="joint")
    assert beside.coords["unit"] == [2, 1]


@pytest.mark.parametrize("mode", ["zero", "mean", "resample", "values"])
@pytest.mark.parametrize("kind", ["resid_mid", "mlp_out", "head_out", "k"])
def test_modes_without_another_run(mode, kind):
    m = model("gemma3")
    clean, _ = pair()
    texts = M.token_ids([5, 11, 8], seed=7)
    more = {"baseline": texts} if mode in ("mean", "resample") else {}
    width = {"head_out": 16, "k": 16}.get(kind, 48)
    given = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with oracle.everything_in_fp64():
        rm = rmfast.RewardModel(m)
        sweep = rm.patch_sweep(clean, mode=given if mode == "values" else mode, sites=kind, seed=5, **more)

        def values(kind, layer):
            own = oracle.activation(m, clean, kind, layer)
            if mode == "zero":
                return torch.zeros_like(own)
            if mode == "values":
                return given[layer].expand_as(own)
            every = torch.cat([oracle.activation(m, text, kind, layer) for text in texts])
            if mode == "mean":
                return every.mean(0).expand_as(own)
            rng = np.random.default_rng(5)
            text = rng.integers(0, 3, len(own))
            token = (rng.random(len(own)) * np.array([len(texts[i]) for i in text])).astype(int)
            return every[np.array([0, 5, 16])[text] + token]

        check(m, sweep, clean, values, kind)
    assert sweep.corrupted_reward is None and sweep.base == "clean"


def test_effect_and_recovered_are_relative_to_the_two_runs():
    m = model("llama")
    clean, corrupted = pair()
    rm = rmfast.RewardModel(m)
    rewards = rm.score([clean, corrupted])
    for mode, base, other in (("denoising", 1, 0), ("noising", 0, 1)):
        sweep = rm.patch_sweep(clean, corrupted, mode=mode, sites="resid_pre", positions="joint")
        torch.testing.assert_close(sweep.base_reward, rewards[base])
        torch.testing.assert_close(sweep.other_reward, rewards[other])
        # All of the embedding replaced: the whole gap.
        torch.testing.assert_close(sweep.recovered[0], torch.ones(1, dtype=torch.float64))
        torch.testing.assert_close(sweep.effect[0, 0], rewards[other] - rewards[base])


def test_sites_without_effect_are_not_run_and_carry_the_base_reward():
    m = model("llama")
    clean, corrupted = pair(changed=(9,))
    rm = rmfast.RewardModel(m)
    sweep = rm.patch_sweep(clean, corrupted)
    assert (sweep.rewards[:, :9] == sweep.base_reward).all() and (sweep.rewards[2, :-1] == sweep.base_reward).all()
    assert sweep.run == 2 * 12 + 1 and sweep.without_effect == 3 * 21 - sweep.run
    assert rm.patch_sweep(clean, corrupted, sites="v").run == 3 * 12 * 2  # k and v count in the last layer too


def test_texts_of_unequal_length_are_aligned():
    m = model("llama")
    clean, corrupted = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 9, 10, 11, 5, 6, 7, 8]
    rm = rmfast.RewardModel(m)
    with oracle.everything_in_fp64():
        sweep = rm.patch_sweep(clean, corrupted)
        partner = [0, 1, None, None, None, 4, 5, 6, 7]
        assert sweep.unpaired == 3 and sweep.rewards[:, 2:5].isnan().all() and not sweep.rewards[:, 5:].isnan().any()
        for position in (5, 8):
            new = oracle.activation(m, clean, "resid_post", 0)[[partner[position]], 0]
            truth = oracle.oracle(m, corrupted, 8, "resid_post", 0, [position], 0, new)
            assert abs(float(sweep.rewards[0, position] - truth)) < 1e-10
        # Where nothing at the end is alike, the read token still gets the other read token's activation.
        short = rm.patch_sweep(clean, corrupted[:5])
        assert short.unpaired == 2 and not short.rewards[:, 4].isnan().any()
        new = oracle.activation(m, clean, "resid_post", 0)[[7], 0]
        truth = oracle.oracle(m, corrupted[:5], 4, "resid_post", 0, [4], 0, new)
        assert abs(float(short.rewards[0, 4] - truth)) < 1e-10
        # So it does where the other text goes on.
        longer = rm.patch_sweep(clean, clean[:5])
        truth = oracle.oracle(m, clean[:5], 4, "resid_post", 0, [4], 0, new)
        assert longer.unpaired == 0 and abs(float(longer.rewards[0, 4] - truth)) < 1e-10
    mapped = rm.patch_sweep(clean, corrupted, align={0: 0, 3: 4, 7: 8})
    assert mapped.unpaired == 6 and not mapped.rewards[:, [0, 4, 8]].isnan().any()


def test_pairs_are_named_that_do_not_differ():
    rm = rmfast.RewardModel(model("llama"))
    with pytest.raises(ValueError, match="to differ in at least one token: those of pair 1 are the same"):
        rm.patch_sweep([[1, 2, 3], [4, 5]], [[1, 2, 4], [4, 5]])


def test_a_map_of_positions_may_count_from_the_end():
    base, other = np.arange(5), np.arange(7)
    for noising, want in ((True, [0, -1, -1, 5, 6]), (False, [0, -1, -1, 4, -1])):
        clean, corrupted = (base, other) if noising else (other, base)
        at = {0: 0, -1: -1, -2: -2, 1: None} if noising else {0: 0, -3: -2, 2: None}
        given = {place % len(clean): each if each is None else each % len(corrupted) for place, each in at.items()}
        assert aligned(base, other, at, noising).tolist() == aligned(base, other, given, noising).tolist() == want
    assert aligned(base, other, [0, -1, None, 5, 6], True).tolist() == [0, -1, -1, 5, 6]


@pytest.mark.parametrize("align", [{-6: 0}, {0: -8}, {5: 0}, [-2], [0, 7]])
def test_positions_that_are_mapped_outside_of_the_texts_are_refused(align):
    with pytest.raises(ValueError, match="Expected align to map positions inside of the texts"):
        aligned(np.arange(5), np.arange(7), align, True)


def test_align_matches_both_ends_and_what_corresponds_between():
    def align(a, b):
        return align_tokens(np.array(a), np.array(b)).tolist()

    assert align([1, 2, 3], [1, 9, 3]) == [0, 1, 2]
    assert align([1, 2, 3], [1, 2, 2, 3]) == [0, 1, 3]
    assert align([1], [2]) == [0]
    assert align([7, 1, 5, 2, 8], [7, 3, 4, 5, 6, 2, 8]) == [0, -1, 3, 5, 6]
    assert align([1, 2, 3, 4, 5], [1, 9, 4, 5]) == [0, -1, -1, 2, 3]


@pytest.mark.parametrize("family", ["phi3-longrope", "llama-dynamic"])
def test_texts_that_get_other_rotary_frequencies_differ_from_the_first_token_on(family):
    m = model(family)
    clean, corrupted = pair(40, (15,))
    corrupted = corrupted[:20]
    with oracle.everything_in_fp64():
        sweep = rmfast.RewardModel(m).patch_sweep(clean, corrupted, max_length=64)
        new = oracle.activation(m, clean, "resid_post", 0)[[10], 0]
        truth = oracle.oracle(m, corrupted, 19, "resid_post", 0, [10], 0, new)
    assert abs(float(sweep.rewards[0, 10] - truth)) < 1e-10 and sweep.rewards[0, 10] != sweep.base_reward


def test_a_checkpoint_of_other_chosen_sites_or_another_model_state_is_refused(tmp_path):
    m = model("llama", torch.float32, labels=2)
    rm, texts = rmfast.RewardModel(m), pair()
    options = {"sites": "head_out", "screen": "atp", "top": 5, "checkpoint": tmp_path / "sweep.safetensors"}
    rm.patch_sweep(*texts, metric=lambda r: r[0], **options)
    with pytest.raises(ValueError, match="a checkpoint of this very sweep"):
        rm.patch_sweep(*texts, metric=lambda r: r[1], **options)
    handle = m.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    with pytest.raises(ValueError, match="a checkpoint of this very sweep"):
        rm.patch_sweep(*texts, metric=lambda r: r[0], **options)
    handle.remove()


def test_results_are_ordinary_tensors_and_positions_any_iterable():
    clean, corrupted = pair()
    rm = rmfast.RewardModel(model("llama", torch.float32))
    first, second = rm.patch_sweep([clean] * 2, [corrupted] * 2, positions=(p for p in (3, 12)))
    assert torch.equal(first.rewards, second.rewards) and not first.rewards.is_inference()
    first.rewards.nan_to_num_()


def test_labels_and_metrics():
    m = model("llama", labels=3)
    clean, corrupted = pair()
    rm = rmfast.RewardModel(m)
    every = rm.patch_sweep(clean, corrupted)
    assert every.axes == ("layer", "position", "label") and every.clean_reward.shape == (3,)
    one = rm.patch_sweep(clean, corrupted, metric=lambda r: r[0] - 2 * r[2])
    assert one.axes == ("layer", "position")
    torch.testing.assert_close(one.rewards, every.rewards[..., 0] - 2 * every.rewards[..., 2])
    torch.testing.assert_close(one.clean_reward, every.clean_reward[0] - 2 * every.clean_reward[2])


def test_lists_give_one_result_for_each_pair():
    m = model("llama")
    pairs = [pair(12, (3,), 1), pair(17, (5, 6), 2)]
    rm = rmfast.RewardModel(m)
    sweeps = rm.patch_sweep([c for c, _ in pairs], [d for _, d in pairs])
    for sweep, (clean, corrupted) in zip(sweeps, pairs, strict=True):
        assert torch.equal(sweep.rewards, rm.patch_sweep(clean, corrupted).rewards)


def test_the_budget_does_not_change_the_numbers():
    m = model("llama")
    clean, corrupted = pair()
    rm = rmfast.RewardModel(m)
    for kind in ("resid_post", "k", "head_out"):
        large = rm.patch_sweep(clean, corrupted, sites=kind)
        small = rm.patch_sweep(clean, corrupted, sites=kind, batch_tokens=25)
        torch.testing.assert_close(large.rewards, small.rewards, rtol=1e-10, atol=1e-10)


def test_running_out_of_memory_halves_the_chunk(monkeypatch):

    m = model("llama", torch.float32)
    clean, corrupted = pair()
    rm = rmfast.RewardModel(m)
    whole = rm.patch_sweep(clean, corrupted)
    run, sizes = Chunk.run, []

    def scarce(chunk):
        sizes.append(len(chunk.edits))
        if len(chunk.edits) > 3:
            raise torch.OutOfMemoryError("no memory")
        return run(chunk)

    monkeypatch.setattr(Chunk, "run", scarce)
    torch.testing.assert_close(rm.patch_sweep(clean, corrupted).rewards, whole.rewards, rtol=1e-5, atol=1e-5)
    assert max(sizes) > 3 and sizes[-1] <= 3


@pytest.mark.parametrize("family", ["llama", "encoder"])
def test_an_interrupted_sweep_goes_on_from_its_checkpoint(family, tmp_path):
    m = M.encoder("Bert", num_hidden_layers=3) if family == "encoder" else model("llama", torch.float32)
    clean, corrupted = pair()
    rm = rmfast.RewardModel(m)
    whole = rm.patch_sweep(clean, corrupted, sites="v", batch_tokens=64)
    calls = []
    patcher = type(patcher_of(rm))
    original, file = patcher.rewards, tmp_path / "sweep.partial.safetensors"

    def interrupted(self, base, edits, values, batch_tokens, done, skip):
        def counted(some, rewards):
            done(some, rewards)
            calls.append(len(some))
            if len(calls) == 3:
                raise KeyboardInterrupt

        return original(self, base, edits, values, batch_tokens, counted, skip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patcher, "rewards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rm.patch_sweep(clean, corrupted, sites="v", batch_tokens=64, checkpoint=file)
        first = sum(calls)
        resumed = rm.patch_sweep(clean, corrupted, sites="v", batch_tokens=64, checkpoint=file)
    assert torch.equal(resumed.rewards, whole.rewards)
    assert sum(calls) == whole.run and first < whole.run  # nothing was run twice
    with pytest.raises(ValueError, match="a checkpoint of this very sweep"):
        rm.patch_sweep(clean, corrupted, sites="k", checkpoint=file)


def test_screening_runs_the_sites_that_attribution_ranks_first():
    m = model("llama")
    clean, corrupted = pair()
    rm = rmfast.RewardModel(m)
    exact = rm.patch_sweep(clean, corrupted, sites="head_out")
    linear = rm.attribution_patch(clean, corrupted, sites="head_out")
    some = rm.patch_sweep(clean, corrupted, sites="head_out", screen="atp", top=7)
    ran = ~some.rewards.isnan() & (some.rewards != some.base_reward)
    assert some.run == 7 and int(ran.sum()) == 7
    torch.testing.assert_close(some.rewards[ran], exact.rewards[ran], rtol=1e-10, atol=1e-10)
    assert linear.effect.abs()[ran].min() >= linear.effect.abs()[~ran].max()
    assert some.screen["n"] == 7 and -1 <= some.screen["spearman"] <= 1


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "head_out", "v"])
def test_encoders_are_patched_by_layer_reuse(kind):
    m = M.encoder("Bert", num_hidden_layers=3).double()
    clean, corrupted = pair(12, (4, 7))
    with oracle.everything_in_fp64():
        sweep = rmfast.RewardModel(m).patch_sweep(clean, corrupted, sites=kind)
        assert sweep.engine == "layers" and sweep.rewards.shape[:2] == (3, 12)
        for cell in ((0, 3), (1, 7), (2, 11)):
            new = oracle.activation(m, clean, kind, cell[0])[[cell[1]], 0]
            truth = oracle.oracle(m, corrupted, 0, kind, cell[0], [cell[1]], 0, new)
            got = sweep.rewards[cell] if sweep.rewards.dim() == 2 else sweep.rewards[(*cell, 0)]
            assert abs(float(got - truth)) < 1e-10


def test_hooks_on_the_model_take_part():
    m = model("llama")
    clean, corrupted = pair()
    handle = m.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    with oracle.everything_in_fp64():
        sweep = rmfast.RewardModel(m).patch_sweep(clean, corrupted)
        assert sweep.engine == "layers"
        check(m, sweep, corrupted, lambda kind, layer: oracle.activation(m, clean, kind, layer), "resid_post")
    handle.remove()


ERRORS = {
    "same texts": ({"corrupted": "clean"}, "to differ in at least one token"),
    "strict": ({"corrupted": [1, 2], "align": "strict"}, 'equal length with align="strict", got 2 and 21'),
    "mode": ({"mode": "swap"}, "to be one of denoising, noising, zero, mean, resample, got 'swap'"),
    "site": ({"sites": "resid"}, "sites to be of resid_pre"),
    "layer": ({"layers": [3]}, "layers to be in [0, 3), got 3"),
    "head": ({"sites": "k", "heads": [2]}, "heads of k to be in [0, 2), got 2"),
    "neurons": ({"sites": "mlp_neuron"}, "Expected neurons, the ones to sweep"),
    "position": ({"positions": [21]}, "positions to be in [0, 21), got 21"),
    "positions": ({"positions": "some"}, 'positions to be "all", "joint"'),
    "budget": ({"batch_tokens": 3}, "batch_tokens to be at least 12, the rows of the longest"),
    "baseline": ({"baseline": ["x"]}, 'baseline (texts) with mode "mean" or "resample" alone'),
    "screen": ({"screen": "atp"}, "screen and top together"),
    "no pair": ({"corrupted": None}, "Expected a corrupted text with mode 'denoising'"),
    "values": ({"corrupted": None, "mode": torch.zeros(5)}, "the values of resid_post in mode to be of shape (48,)"),
    "map": ({"align": {0: 99}}, "map positions inside of the texts, got 0 -> 99"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_named(case):
    clean, corrupted = pair()
    options, message = ERRORS[case]
    given = {"corrupted": corrupted} | options
    if isinstance(given["corrupted"], str):
        given["corrupted"] = clean
    with pytest.raises(ValueError, match=re.escape(message)):
        rmfast.RewardModel(model("llama", torch.float32)).patch_sweep(clean, **given)


def test_parts_that_layers_lack_are_named():
    m = M.decoder("llama")
    for layer in m.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()
    rm = rmfast.RewardModel(m)
    assert rm.patch_sweep(*pair()).engine == "suffix"
    assert rm.patch_sweep(*pair(), sites="mlp_neuron", neurons=[0]).engine == "layers"  # an inner part only hooks reach
    config = transformers.GPTNeoXConfig(
        vocab_size=272, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_labels=1
    )
    neox = rmfast.RewardModel(M.randomised(transformers.GPTNeoXForSequenceClassification(config)))
    with pytest.raises(ValueError, match="resid_mid: its attention and MLP read the same stream"):
        neox.patch_sweep(*pair(), sites="resid_mid")


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("kind", ["resid_post", "attn_out", "head_out", "q", "mlp_neuron"])
def test_attribution_is_the_sweep_s_slope(family, kind):
    m = M.encoder("Bert").double() if family == "bert" else model(family)
    clean = M.token_ids([12])[0]
    more = {"neurons": NEURONS} if kind == "mlp_neuron" else {}
    with oracle.everything_in_fp64():
        rm = rmfast.RewardModel(m)
        size = oracle.activation(m, clean, kind, 0).shape[1:]
        # The base run's activations at position 5, and a little more.
        options = {"sites": kind, "positions": [5], "layers": [0], **more}
        own = oracle.activation(m, clean, kind, 0)[5]
        if kind == "mlp_neuron":
            options["neurons"] = NEURONS[:1]
            own = oracle.activation(m, clean, kind, 0)[5, NEURONS[0]].expand(size)
        change = 1e-5 * torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        up, down = (rm.patch_sweep(clean, mode=(own + sign * change)[None], **options).rewards for sign in (1, -1))
        linear = rm.attribution_patch(clean, mode=(own + change)[None], **options)
    assert linear.method == "attribution" and linear.axes[:2] == ("layer", "position")
    torch.testing.assert_close(linear.effect, (up - down) / 2, rtol=1e-6, atol=1e-12)
