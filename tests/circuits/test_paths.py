"""path_patch against two forwards with plain hooks for each path, on the unmodified model (hooked_paths.py)."""

from __future__ import annotations

import random

import families
import hooked_paths
import models as M
import numpy as np
import oracle
import pytest
import torch

import rmfast
from rmfast.circuits.nodes import RECEIVERS, SENDERS, Node
from rmfast.circuits.paths import path_patch

SUFFIX = ["llama", "gemma2", "qwen3", "gpt2", "olmo2", "neox"]
HOOKED = ["bert", "distilbert", "modernbert"]
SOME = ["gemma2", "gpt2", "neox", "bert"]


def model(family, dtype=torch.float64, layers=3, **kw):
    if family == "bert":
        made = M.encoder("Bert", num_hidden_layers=layers, **kw)
    elif family == "distilbert":
        made = M.encoder("DistilBert", hidden_dim=80, num_hidden_layers=layers, **kw)
    elif family == "modernbert":
        made = M.encoder("ModernBert", cls_token_id=M.CLS, sep_token_id=M.SEP, num_hidden_layers=layers, **kw)
    elif family in families.FAMILIES and family != "gpt2":
        made = families.model(family, layers=layers, **kw)
    else:
        made = M.decoder(family, num_hidden_layers=layers, **kw)
    return made.to(dtype)


def texts(length=13, changed=(5, 6, 9)):
    clean = M.token_ids([length], 3)[0]
    return clean, [(x + 17) % 256 if t in changed else x for t, x in enumerate(clean)]


def leads(sender, receiver, parallel=False):
    """Whether a path leads from one to the other, written out."""
    if sender.kind == "embedding" or receiver.kind == "reward":
        return True
    if receiver.kind == "mlp_input" and sender.kind == "head_out" and not parallel:
        return sender.layer <= receiver.layer
    return sender.layer < receiver.layer


def check(m, found, base, other, read, cells=10, tolerance=1e-9, scale=1.0, seed=0, **how):
    """Some of each kind of path."""
    run = [
        (s, r, p)
        for s, sender in enumerate(found.senders)
        for r, receiver in enumerate(found.receivers)
        for p in range(len(found.positions))
        if leads(sender, receiver, how.get("parallel", False))
    ]
    how.pop("parallel", None)
    rewards = found.rewards.reshape(len(found.senders), len(found.receivers), len(found.positions), -1)
    for s, r, p in random.Random(seed).sample(run, min(cells, len(run))):
        sender, receiver = found.senders[s], found.receivers[r]
        positions = found.positions[p]
        if "partner" in how:
            positions = [t for t in positions if how["partner"][t] >= 0]
        truth = hooked_paths.path(m, base, other, read, sender, receiver, positions, found.through, **how)
        error = (rewards[s, r, p] - truth).abs() / truth.abs().clamp(min=scale)
        assert float(error.max()) <= tolerance, (str(sender), str(receiver), positions, float(error.max()))


@pytest.mark.parametrize(
    "family, through",
    [*((family, "residual") for family in (*SUFFIX, *HOOKED)), *((family, "mlps") for family in SOME)],
)
def test_every_path_is_what_two_hooked_forwards_give(family, through):
    m, (clean, corrupted) = model(family), texts()
    with oracle.everything_in_fp64():
        found = path_patch(rmfast.RewardModel(m), clean, corrupted, receivers=RECEIVERS, through=through)
        assert found.engine == ("suffix" if family in SUFFIX else "layers")
        assert found.axes == ("sender", "receiver")
        parallel = family == "neox"
        for s, sender in enumerate(found.senders):
            for r, receiver in enumerate(found.receivers):
                assert bool(found.rewards[s, r].isnan()) != leads(sender, receiver, parallel), (sender, receiver)
        check(m, found, clean, corrupted, len(clean) - 1, cells=10, parallel=parallel)
    assert (found.effect.nan_to_num().abs() > 1e-6).float().mean() > 0.2


@pytest.mark.parametrize("through", ["residual", "mlps"])
def test_hooks_give_what_the_suffix_engine_gives(through):
    m, (clean, corrupted) = model("gemma2", layers=2), texts()
    with oracle.everything_in_fp64():
        ours = path_patch(rmfast.RewardModel(m), clean, corrupted, receivers=RECEIVERS, through=through)
        m.model.layers[0].mlp.register_forward_hook(lambda *_: None)  # of a user's: the layers run as they are
        hooked = path_patch(rmfast.RewardModel(m), clean, corrupted, receivers=RECEIVERS, through=through)
    assert (ours.engine, hooked.engine) == ("suffix", "layers")
    torch.testing.assert_close(ours.rewards, hooked.rewards, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2", "bert"])
def test_fp32_is_within_1e_5_of_the_reward_scale(family):
    m, (clean, corrupted) = model(family, torch.float32), texts()
    found = path_patch(rmfast.RewardModel(m), clean, corrupted, receivers=RECEIVERS)
    exact = m.double()
    scale = M.reward_scale(exact) if family != "bert" else float(exact.classifier.weight.detach().norm())
    with oracle.everything_in_fp64():
        check(exact, found, clean, corrupted, len(clean) - 1, cells=8, tolerance=1e-5, scale=scale)


@pytest.mark.parametrize("mode, through", [("noising", "mlps"), ("denoising", "residual")])
def test_positions_modes_and_labels(mode, through):
    m, (clean, corrupted) = model("qwen3", labels=2), texts()
    base, other = (clean, corrupted) if mode == "noising" else (corrupted, clean)
    with oracle.everything_in_fp64():
        found = path_patch(
            rmfast.RewardModel(m), clean, corrupted, receivers=["q_input", "v_input", "mlp_input", "reward"], mode=mode,
            positions=[6, [5, 9, 12], slice(-3, None), 2], through=through,
        )  # fmt: skip
        assert found.axes == ("sender", "receiver", "position", "label") and found.rewards.size(-1) == 2
        check(m, found, base, other, len(clean) - 1)
    # Before the first difference nothing changes, and at the reward only the token that is read counts.
    nothing = found.effect[:, :, 3]
    assert (nothing.isnan() | (nothing == 0)).all()
    assert (found.effect[:, -1, 0] == 0).all()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_path_has_the_same_bits_beside_any_others(family):
    rm, (clean, corrupted) = rmfast.RewardModel(model(family, torch.float32, layers=2)), texts()
    if reason := rm.packed_engine().moves():
        pytest.skip(reason)
    whole, small = (path_patch(rm, clean, corrupted, receivers=RECEIVERS, batch_tokens=rows) for rows in (None, 13))
    assert torch.equal(small.rewards.nan_to_num(7), whole.rewards.nan_to_num(7))


def test_texts_of_unequal_length():
    m, (clean, _) = model("llama"), texts()
    corrupted = [*clean[:5], 7, 8, *clean[6:]]
    with oracle.everything_in_fp64():
        found = path_patch(rmfast.RewardModel(m), clean, corrupted, receivers=["k_input", "mlp_input", "reward"])
        partner = [*range(5), -1, *range(7, 14)]
        assert found.unpaired == 1
        check(m, found, clean, corrupted, len(clean) - 1, partner=partner)


@pytest.mark.parametrize("through", ["residual", "mlps"])
def test_text_behind_the_token_that_is_read(through):
    m, (clean, corrupted) = model("gemma2"), texts()
    clean, corrupted = ([65 if t == 10 else x + (x == 65) for t, x in enumerate(ids)] for ids in (clean, corrupted))
    with oracle.everything_in_fp64():
        rm = rmfast.RewardModel(m, pooling=65)
        found = path_patch(
            rm, clean, corrupted, receivers=RECEIVERS, positions=[slice(None), [6, 9, 12]], through=through
        )
        check(m, found, clean, corrupted, 10)


def test_texts_of_one_token():
    m, long = model("llama"), texts()[0]
    with oracle.everything_in_fp64():
        rm = rmfast.RewardModel(m)
        check(m, path_patch(rm, [7], [9], receivers=RECEIVERS), [7], [9], 0)
        check(m, path_patch(rm, [7], long, receivers=RECEIVERS), [7], long, 0, partner=[12])
        check(m, path_patch(rm, long, [7], receivers=RECEIVERS), long, [7], 12, partner=[-1] * 12 + [0])


def test_single_edges_are_those_of_the_whole_grid():
    m, (clean, corrupted) = model("llama"), texts()
    rm = rmfast.RewardModel(m)
    with oracle.everything_in_fp64():
        whole = path_patch(rm, clean, corrupted, receivers=RECEIVERS)
        edges = [
            (Node("head_out", 0, 3), Node("q_input", 2, -1)),
            ("embedding", "reward"),
            (Node("mlp_out", -2), "reward"),
        ]
        some = path_patch(rm, clean, corrupted, edges=edges)
    assert some.senders == [Node("head_out", 0, 3), Node("embedding"), Node("mlp_out", 1)]
    assert some.receivers == [Node("q_input", 2, 3), Node("reward")]
    assert some.rewards.isnan().tolist() == [[False, True], [True, False], [True, False]]
    for s, r in ((0, 0), (1, 1), (2, 1)):
        at = whole.senders.index(some.senders[s]), whole.receivers.index(some.receivers[r])
        torch.testing.assert_close(some.rewards[s, r], whole.rewards[at], rtol=1e-10, atol=1e-10)


def test_all_senders_changes_make_the_whole_difference_of_the_stream_that_is_read():
    """Parts are of what they are said to be: frozen, they add up to the other run, but for projections' biases."""
    m, (clean, corrupted) = model("gemma2"), texts()
    with oracle.everything_in_fp64():
        rm = rmfast.RewardModel(m)
        both = path_patch(rm, [clean, corrupted], [corrupted, clean])
    assert [len(each.senders) for each in both] == [1 + 3 * 4 + 3] * 2
    total = torch.zeros(48, dtype=torch.float64)
    with oracle.everything_in_fp64():
        for sender in both[0].senders:
            change = hooked_paths.sent(m, corrupted, sender) - hooked_paths.sent(m, clean, sender)
            total += change[-1]
        stream = [oracle.activation(m, ids, "resid_post", 2)[-1, 0] for ids in (clean, corrupted)]
    torch.testing.assert_close(total, stream[1] - stream[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(both[0].base_reward, both[1].other_reward)


def test_an_adapter_on_the_output_projection_is_part_of_a_head():
    from peft import LoraConfig, get_peft_model

    m, (clean, corrupted) = model("llama", torch.float32), texts()
    torch.manual_seed(0)
    adapted = get_peft_model(m, LoraConfig(target_modules=["o_proj"], init_lora_weights=False)).eval()
    found = path_patch(rmfast.RewardModel(adapted), clean, corrupted, senders="head_out")
    merged = adapted.merge_and_unload()
    wanted = path_patch(rmfast.RewardModel(merged), clean, corrupted, senders="head_out")
    torch.testing.assert_close(found.rewards, wanted.rewards, rtol=1e-5, atol=1e-5)
    assert (found.effect.abs() > 1e-4).any()


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"senders": "attn_out"}, "senders to be of embedding, head_out, mlp_out"),
        ({"receivers": Node("q_input", 0, 7)}, "head of q_input to be in \\[0, 4\\)"),
        ({"receivers": Node("k_input", 0, 3)}, "head of k_input to be in \\[0, 2\\)"),
        ({"senders": Node("mlp_out", 3)}, "layer of mlp_out to be in \\[0, 3\\)"),
        ({"senders": Node("mlp_out", 1, 0)}, "mlp_out to have no head"),
        ({"receivers": Node("reward", 1)}, "reward to have neither layer nor head"),
        ({"senders": []}, "senders to name at least one"),
        ({"edges": []}, "edges to name at least one"),
        ({"senders": Node("mlp_out", 2), "receivers": Node("q_input", 1)}, "a sender that comes before a receiver"),
        ({"mode": "zero"}, "mode to be"),
        ({"through": "heads"}, "through to be"),
        ({"batch_tokens": 2, "receivers": "q_input"}, "batch_tokens to be at least"),
    ],
)  # fmt: skip
def test_refusals(asked, message):
    clean, corrupted = texts()
    with pytest.raises(ValueError, match=message):
        path_patch(rmfast.RewardModel(model("llama")), clean, corrupted, **asked)


def test_wrong_types_and_options_of_sweeps_are_refused():
    rm, (clean, corrupted) = rmfast.RewardModel(model("llama")), texts()
    with pytest.raises(TypeError, match="rm to be a Scorer"):
        path_patch(rm.model, clean, corrupted)
    for option in ({"layers": [0]}, {"patterns": "frozen"}, {"heads": [1]}, {"batch_token": 99}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(option))}'"):
            path_patch(rm, clean, corrupted, senders="head_out", **option)
    with pytest.raises(TypeError, match="senders to be kinds or nodes"):
        path_patch(rm, clean, corrupted, senders=[("head_out", 1)])
    with pytest.raises(ValueError, match="differ in at least one token"):
        path_patch(rm, clean, clean)


def test_a_model_whose_projection_has_no_queries_in_a_row_is_refused_by_name():
    clean, corrupted = texts()
    m = model("falcon-40b", torch.float32)
    m.transformer.h[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="to have q"):
        path_patch(rmfast.RewardModel(m), clean, corrupted, receivers="q_input")


def test_a_result_prints_ranks_draws_and_comes_back(tmp_path):
    pytest.importorskip("matplotlib")
    rm, (clean, corrupted) = rmfast.RewardModel(model("llama", torch.float32)), texts()
    found = path_patch(rm, clean, corrupted, receivers=RECEIVERS, positions=[[5, 6], 9])
    assert repr(found).startswith("PathPatch(noising, sender 16 × receiver 28 × position 2, reward ")
    first, *rest = found.top(5)
    assert all(abs(first.effect) >= abs(row.effect) for row in rest)
    at = found.senders.index(first.sender), found.receivers.index(first.receiver)
    place = ["5-6", 9].index(first.position)
    assert first.reward == pytest.approx(float(found.rewards[(*at, place)]))
    frame = found.to_dataframe()
    assert len(frame) == found.rewards.numel() and frame["sender"][0] == "embedding"
    assert list(frame) == ["sender", "receiver", "position", "label", "reward", "effect", "recovered"]
    axes = found.plot("recovered")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("receiver", "sender")
    assert found._repr_html_().startswith("<img")
    found.save(tmp_path / "paths")
    back = type(found).load(tmp_path / "paths")
    assert torch.equal(back.rewards.nan_to_num(7), found.rewards.nan_to_num(7))
    assert (back.senders, back.receivers, back.positions) == (found.senders, found.receivers, found.positions)
    with pytest.raises(ValueError, match="a folder that PathPatch"):
        type(found).load(tmp_path)


def test_a_metric_takes_the_place_of_the_rewards():
    rm, (clean, corrupted) = rmfast.RewardModel(model("llama", labels=2)), texts()
    plain = path_patch(rm, clean, corrupted, senders=SENDERS)
    metric = path_patch(rm, clean, corrupted, senders=SENDERS, metric=lambda rewards: rewards[0] - rewards[1])
    assert metric.axes == ("sender", "receiver")
    torch.testing.assert_close(metric.rewards, (plain.rewards[..., 0] - plain.rewards[..., 1]).double())
    assert np.isfinite(metric.rewards.numpy()).all()
