"""Directions learned from pairs: cosines that noise does not pull, planted conflicts, and terms without a direction."""

from __future__ import annotations

import json

import models as M
import numpy as np
import oracle as O
import pytest
import torch
from scipy import stats

import rmfast
from rmfast.interpret.learned_conflict import compared, learned_conflict

TERMS = ["help", "harm"]


def differences(seed, cosine=0.0, n=40, d=30, size=1.0, shared=0.0):
    """Of two terms whose directions have this cosine, in noise; `shared` noise is in both terms of an item."""
    rng = np.random.default_rng(seed)
    u = np.eye(d)[:2]
    u[1] = cosine * u[0] + np.sqrt(1 - cosine**2) * u[1]
    common = shared * rng.normal(size=(n, 1, d))
    return size * u + common + rng.normal(size=(n, 2, d))


def found(each, **options):
    given = {"confidence": 0.95, "resamples": 200, "permutations": 199, "seed": 0, **options}
    return compared(TERMS, each, "after", **given)


def test_products_are_between_different_prompts():
    each = differences(0, 0.5, n=20, size=3.0)
    n = len(each)
    product = {
        (s, t): sum(each[i, s] @ each[j, t] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        for s in (0, 1)
        for t in (0, 1)
    }
    row = found(each)["help", "harm"]
    assert row.value == pytest.approx(product[0, 1] / np.sqrt(product[0, 0] * product[1, 1]))


def test_noise_that_terms_share_is_no_alignment():
    """The plain cosine of the means is off by what an item's two terms have in common."""
    right, plain = [], []
    for seed in range(100):
        each = differences(seed, 0.0, n=80, size=2.0, shared=2.0)
        right.append(found(each, resamples=1, permutations=1)["help", "harm"].value)
        a, b = each.mean(0)
        plain.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert abs(np.mean(right)) < 0.1 and np.mean(plain) > 0.2


def test_a_planted_conflict_is_found_and_orthogonal_terms_are_not_at_the_stated_rate():
    row = found(differences(0, -0.8, size=2.0))["help", "harm"]
    assert row.low < -0.8 < row.high and row.high < 0 and row.p_all <= 0.01
    wrong = sum(found(differences(seed, size=2.0), resamples=1)["help", "harm"].p <= 0.05 for seed in range(200))
    assert wrong <= stats.binom.ppf(0.999, 200, 0.05)


def test_a_term_without_a_direction_has_no_angle():
    each = differences(0, size=2.0)
    each[::2, 1] *= -1  # half of its pairs the other way round
    each[:, 1] -= each[:, 1].mean(0)
    f = found(each)
    assert np.isnan(f["help", "harm"].value) and np.isnan(f["help", "harm"].p) and np.isnan(f.lengths["harm"])
    assert "–" in repr(f)


def items(n=20):
    return [
        (f"ask {i}", {"help": (f"sure {i * i}", f"no {i}"), "harm": (f"kind {i}", f"unkind {i + 7}")}) for i in range(n)
    ]


@pytest.mark.parametrize("norm", ["before", "after"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2"])
def test_directions_against_hooks(family, norm):
    model, tokenizer = M.decoder(family), M.tokenizer(chat=True)
    rm = rmfast.RewardModel(model, tokenizer)
    f = learned_conflict(rm, items(), norm=norm, resamples=20, permutations=20)
    last = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    seen = []
    with (
        O.everything_in_fp64(),
        torch.no_grad(),
        last.register_forward_hook(lambda m, args, out: seen.append((args[0] if norm == "before" else out)[0, -1])),
    ):
        model.double()
        for prompt, terms in items():
            for two in terms.values():
                for side in two:
                    model(input_ids=torch.from_numpy(rm.encode([(prompt, side)])[0].ids)[None])
    x = torch.stack(seen).reshape(20, 2, 2, -1)
    want = (x[:, :, 0] - x[:, :, 1]).mean(0)
    torch.testing.assert_close(f.directions.double(), want, rtol=0, atol=1e-5 * float(x.norm(dim=-1).max()))
    again = compared(TERMS, (x[:, :, 0] - x[:, :, 1]).numpy(), norm, 0.95, 1, 1, 0)
    assert f["help", "harm"].value == pytest.approx(again["help", "harm"].value, abs=1e-4, nan_ok=True)


def test_what_it_writes(tmp_path):
    f = found(differences(0, 0.5, size=2.0))
    f.save(tmp_path / "conflict.json")
    kept = json.loads((tmp_path / "conflict.json").read_text())
    assert kept["norm"] == "after" and kept["rows"][0]["value"] == f.rows[0].value
    assert "cosines of mean differences after the norm, 40 prompts" in repr(f)
    assert list(f.to_dataframe()["first"]) == ["help"]


@pytest.mark.parametrize(
    "some, match",
    [
        ([("p", "x")], r"item 0 to be \(prompt"),
        ([("p", {"help": ("a", "b")})], "at least two terms"),
        ([*items(20), ("p", {"help": ("a", "b")})], "in item 20"),
        ([("p", {"help": ("a", "b"), "harm": ("a",)})], r"\(better, worse\) of 'harm' in item 0"),
        (items(19), "at least 20 prompts, got 19"),
    ],
)
def test_items_of_another_form_are_refused(some, match):
    with pytest.raises(ValueError, match=match):
        learned_conflict(rmfast.RewardModel(M.decoder(), M.tokenizer(chat=True)), some)


def test_models_without_a_token_s_stream_are_refused():
    bert = rmfast.RewardModel(M.encoder(), M.tokenizer("encoder"))
    with pytest.raises(ValueError, match="pools by itself"):
        learned_conflict(bert, items())
