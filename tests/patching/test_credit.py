"""Rewards at every token of edited runs, against plain hooks on the unmodified model (tests/oracle.py)."""

from __future__ import annotations

import random

import models as M
import oracle
import pytest
import torch

import rmfast
from rmfast.patching.credit import CreditSweep, credit_sweep

FAMILIES = ["llama", "gemma2", "qwen3", "gpt2"]
KINDS = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_out", "mlp_neuron", "q", "k", "v"]


def model(family, dtype=torch.float64, **kw):
    return M.decoder(family, num_hidden_layers=3, **kw).to(dtype)


def pair(length=13, changed=(4, 7, 8), seed=3):
    clean = M.token_ids([length], seed)[0]
    return clean, [(token + 17) % 256 if i in changed else token for i, token in enumerate(clean)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_s_value_is_what_one_hooked_forward_gives(family, kind):
    m = model(family)
    clean, corrupted = pair()
    neurons = {"neurons": [3, 79]} if kind == "mlp_neuron" else {}
    with oracle.everything_in_fp64():
        found = credit_sweep(rmfast.RewardModel(m), clean, corrupted, sites=kind, **neurons)
        new = oracle.activation(m, clean, kind, 0), oracle.activation(m, clean, kind, 2)
        shape = found.sweep.rewards.shape
        cells = [(layer, t) for layer in (0, 2) for t in range(13)]
        for layer, position in [*random.Random(0).sample(cells, 4), (2, 8)]:
            place = shape[2] - 1 if len(shape) > 2 else 0
            unit = neurons["neurons"][place] if neurons else place
            values = new[layer > 0][[position], unit]
            truth = oracle.oracle(m, corrupted, slice(None), kind, layer, [position], unit, values)[:, 0]
            got = found.values[layer, position, place] if len(shape) > 2 else found.values[layer, position]
            torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_positions_and_the_last_token_are_the_sweep_s(family):
    m = model(family)
    clean, corrupted = pair()
    options = {"sites": ["resid_post", "attn_out", "v"], "positions": [[4, 8], 7, range(6, 13)], "mode": "noising"}
    with oracle.everything_in_fp64():
        rm = rmfast.RewardModel(m)
        found, plain = credit_sweep(rm, clean, corrupted, **options), rm.patch_sweep(clean, corrupted, **options)
        torch.testing.assert_close(found.values[..., -1], plain.rewards, rtol=1e-10, atol=1e-10, equal_nan=True)
        torch.testing.assert_close(found.sweep.rewards, plain.rewards, rtol=1e-10, atol=1e-10, equal_nan=True)
        torch.testing.assert_close(found.base_values, rm.token_values([clean])[0])
        torch.testing.assert_close(found.other_values, rm.token_values([corrupted])[0])
    assert found.sweep.clean_reward.shape == () and found.sweep.axes == plain.axes


def test_credits_add_up_to_the_effect_and_start_with_the_edit():
    rm = rmfast.RewardModel(model("llama"))
    found = credit_sweep(rm, *pair())
    torch.testing.assert_close(found.credit.sum(-1), found.sweep.effect)
    torch.testing.assert_close(found.credits.sum(-1), found.sweep.rewards)
    torch.testing.assert_close(found.base_credits.cumsum(0), found.base_values)
    for position in range(13):
        assert (found.effect[:, position, : max(position, 4)] == 0).all()
    last = found.effect[2]  # the last layer's stream at a token is read there alone
    torch.testing.assert_close(last, torch.diag(last.diag()))
    assert (last.diag()[4:] != 0).all() and found.sweep.run == 3 * 9


def test_the_budget_does_not_change_the_values():
    rm = rmfast.RewardModel(model("qwen3"))
    for kind in ("resid_post", "k", "head_out"):
        whole = credit_sweep(rm, *pair(), sites=kind)
        torch.testing.assert_close(
            whole.values, credit_sweep(rm, *pair(), sites=kind, batch_tokens=14).values, rtol=1e-10, atol=1e-10
        )


def test_fp32_and_text_behind_the_read_token():
    m = model("llama", torch.float32)
    clean, corrupted = pair()
    rm = rmfast.RewardModel(m, pooling=5)
    clean, corrupted = [*clean[:9], 5, *clean[9:11]], [*corrupted[:9], 5, *corrupted[9:11]]
    found = credit_sweep(rm, clean, corrupted)
    assert found.values.shape == (3, 12, 10) and len(found.sweep.tokens) == 12
    new = oracle.activation(m, clean, "resid_post", 0)[[7], 0]
    truth = oracle.oracle(m, corrupted, slice(0, 10), "resid_post", 0, [7], 0, new)[:, 0]
    torch.testing.assert_close(found.values[0, 7], truth, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def found():
    return credit_sweep(rmfast.RewardModel(model("llama")), *pair(), sites=["attn_out", "mlp_out"])


def test_a_part_of_the_grid_keeps_all_tokens(found):
    part = found.select(site="mlp_out", position=7, layer=[2, 0])
    assert torch.equal(part.values, found.values[1, [2, 0], 7]) and part.sweep.axes == ("layer",)
    assert torch.equal(part.sweep.rewards, found.sweep.rewards[1, [2, 0], 7])


def test_top_ranks_sites_and_tokens_by_credit(found):
    rows = found.top(5)
    sizes = [abs(row.credit) for row in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == found.credit.abs().max()
    row = rows[0]
    part = found.select(site=row.site, layer=row.layer, position=row.position)
    assert (part.values[row.at], part.effect[row.at], part.credit[row.at]) == row[-3:]
    assert row._fields == ("site", "layer", "position", "token", "at", "at_token", "value", "effect", "credit")


def test_a_saved_one_comes_back_and_is_drawn(found, tmp_path):
    found.save(tmp_path)
    again = CreditSweep.load(tmp_path)
    assert torch.equal(again.values, found.values) and torch.equal(again.other_values, found.other_values)
    assert again.sweep.coords == found.sweep.coords
    with pytest.raises(ValueError, match="Expected a folder that"):
        CreditSweep.load(tmp_path / "none")
    pandas = pytest.importorskip("pandas")
    table = found.to_dataframe()
    assert isinstance(table, pandas.DataFrame) and len(table) == found.values.numel()
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axis = found.select(site="mlp_out", layer=1).plot()
    assert axis.images[0].get_array().shape == (13, 13)
    assert found.select(site="mlp_out", position=7).plot("values").images[0].get_array().shape == (3, 13)
    with pytest.raises(ValueError, match=r"got site, layer, position: select\(\) first"):
        found.plot()
    pyplot.close("all")


def test_several_pairs_and_modes_of_one_run():
    rm = rmfast.RewardModel(model("llama", torch.float32))
    clean, corrupted = pair()
    first, second = credit_sweep(rm, [clean, corrupted], mode="zero", sites="mlp_out", positions="joint")
    assert first.other_values is None and first.values.shape == (3, 1, 13)
    assert not torch.equal(first.values, second.values) and not first.values.is_inference()


def test_models_whose_tokens_have_no_values_are_named():
    with pytest.raises(ValueError, match="a head of one label"):
        credit_sweep(rmfast.RewardModel(model("llama", labels=2)), *pair())
    with pytest.raises(ValueError, match="that the suffix engine runs"):
        credit_sweep(rmfast.RewardModel(M.encoder("Bert")), *pair())
    hooked = model("llama")
    handle = hooked.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    with pytest.raises(ValueError, match=r"that the suffix engine runs.*hooks"):
        credit_sweep(rmfast.RewardModel(hooked), *pair())
    handle.remove()
    with pytest.raises(TypeError, match="unexpected keyword argument 'metric'"):
        credit_sweep(rmfast.RewardModel(model("llama")), *pair(), metric=sum)
