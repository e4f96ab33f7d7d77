"""Differences between ways to score: none where there are none, planted ones found, ways that can't be tried named."""

from __future__ import annotations

import models
import pytest
import torch
import written

import rmfast
from rmfast import evaluation, heads
from rmfast.evaluation.parity import plain

PAIRS = [(row["prompt"], row[side]) for row in written.pairs(8) for side in ("chosen", "rejected")]


def model(**kw):
    return rmfast.RewardModel(models.decoder(**kw), models.tokenizer(chat=True))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_all_ways_agree(family):
    found = evaluation.parity(model(family=family), PAIRS)
    assert [row.why for row in found.rows] == [""] * 5
    assert found.largest < 2e-5 < found.spread
    assert found["alone"].largest == found["in small batches, reversed"].largest == 0  # to the bit, on a CPU
    assert all(row.n == len(PAIRS) for row in found.rows)


def test_transformers_scores_are_its_own_logits_alone():
    rm = model()
    encoded = rm.encode(PAIRS)
    expected = [float(models.alone(rm.model, item.ids.tolist())) for item in encoded]
    assert plain(rm, encoded, 1) == expected
    assert plain(rm, encoded, 3) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_token_classification_and_encoders_have_plain_forms(task):
    for rm in (
        rmfast.RewardModel(models.decoder(task=task), models.tokenizer()),
        rmfast.RewardModel(models.encoder(task=task), models.tokenizer("encoder")),
    ):
        found = evaluation.parity(rm, PAIRS)
        assert found.largest < 2e-5, str(found)
        assert found["transformers, alone"].why == ""


def test_a_score_that_moved_is_found():
    rm = model()
    scores = rm.score(PAIRS).double()
    scores[5] += 0.25
    found = evaluation.parity(rm, PAIRS, scores=scores)
    for row in found.rows:
        assert (row.text, row.largest) == (5, pytest.approx(0.25, abs=1e-4))
    assert found["alone"].moved == 1
    assert "largest difference 0.25" in str(found)


def test_a_model_whose_padded_batches_move_is_found(monkeypatch):
    rm = model()
    forward = rm.model.forward

    def moved(*args, attention_mask=None, **kw):
        out = forward(*args, attention_mask=attention_mask, **kw)
        if attention_mask is not None and (attention_mask == 0).any():
            out.logits = out.logits + 0.5
        return out

    monkeypatch.setattr(rm.model, "forward", moved)
    found = evaluation.parity(rm, PAIRS, scores=torch.tensor(plain(rm, rm.encode(PAIRS), 1)))
    assert found["transformers, alone"].largest == 0
    assert found["transformers, batches of 8"].largest == pytest.approx(0.5, abs=1e-4)


def test_ways_that_cannot_be_tried_say_why():
    rm = model()
    under = evaluation.parity(rm.with_interventions(rmfast.LengthPenalty(0.1)), PAIRS)
    assert under["transformers, alone"].why == "it knows no interventions" and under.largest < 2e-5
    at_token = rmfast.RewardModel(models.decoder(), models.tokenizer(chat=True), pooling=models.EOS)
    assert "pooling=257" in evaluation.parity(at_token, PAIRS)["transformers, alone"].why
    padless = rmfast.RewardModel(models.decoder(pad_token_id=None), models.tokenizer(chat=True))
    found = evaluation.parity(padless, PAIRS)
    assert found["transformers, batches of 8"].why == "the model has no pad_token_id"
    assert "(the model has no pad_token_id)" in str(found)
    invariant = rmfast.RewardModel(models.decoder(), models.tokenizer(chat=True), invariant=True)
    assert evaluation.parity(invariant, PAIRS)["padded engine"].why == "it promises no equal bits"


def gated():
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=draw) / 7 for shape in ((24, 48), (6, 24))]
    return heads.Gated(
        weight=torch.randn(6, 48, generator=draw) / 7, transform=torch.eye(6), temperature=0.3,
        gate=heads.Layers(weights=weights, biases=[None, None]),
    )  # fmt: skip


HEADS = {
    "tokens": ("CausalLM", lambda: rmfast.TokenHead("+", "-")),
    "token rows with a cap": ("gemma2", lambda: rmfast.TokenHead("+", "-")),
    "gated": ("SequenceClassification", gated),
    "linear": ("SequenceClassification", lambda: heads.Linear(weight=torch.ones(1, 48), bias=torch.ones(1))),
    "function": ("SequenceClassification", lambda: lambda rows: torch.sigmoid(rows.mean(1))),
    "function of a text": (
        "SequenceClassification", lambda: heads.FunctionHead(of=lambda rows: rows.mean(), reads="text"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_are_data_or_functions_have_plain_forms(name):
    task, head = HEADS[name]
    kw = (
        {"family": "gemma2", "task": "CausalLM", "final_logit_softcapping": 3.0} if task == "gemma2" else {"task": task}
    )
    rm = rmfast.RewardModel(models.decoder(**kw), models.tokenizer(chat=True), head=head())
    found = evaluation.parity(rm, PAIRS)
    assert [found[way].why for way in ("transformers, alone", "transformers, batches of 8")] == ["", ""]
    assert found.largest < 2e-5 < found.spread, str(found)


def test_texts_over_the_models_limit_are_scored_where_that_was_asked_for():
    long = [("x" * 300, "a"), ("x" * 200, "bc")]
    found = evaluation.parity(model(), long, max_length=400)
    assert found.largest < 1e-4
    cut = evaluation.parity(model(), long, max_length=20, truncation="left")
    assert cut.largest < 2e-5


def test_what_is_wrong_is_said():
    rm = model()
    with pytest.raises(ValueError, match="at least one text"):
        evaluation.parity(rm, [])
    with pytest.raises(ValueError, match="scores to be of shape"):
        evaluation.parity(rm, PAIRS, scores=[1.0])
    with pytest.raises(ValueError, match="model of one reward"):
        evaluation.parity(model(labels=2), PAIRS)
