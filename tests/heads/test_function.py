"""Heads that are functions of the final hidden states."""

from __future__ import annotations

import headed as C
import models as M
import pytest
import torch

import rmfast
from rmfast.heads import FunctionHead

TEXTS = M.token_ids([5, 30, 3, 17, 24, 2])


@pytest.fixture
def model():
    return M.decoder("llama")


def test_a_function_of_rows_is_the_head(model):
    w = model.score.weight.detach()
    plain = rmfast.RewardModel(model)
    rm = rmfast.RewardModel(model.model, head=lambda x: torch.sigmoid(x.float() @ w[0]))
    for engine in ("packed", "padded"):
        C.assert_near(rm.score(TEXTS, engine=engine), plain.score(TEXTS).double().sigmoid())
    for got, want in zip(rm.token_values(TEXTS), plain.token_values(TEXTS)):
        C.assert_near(got, want.double().sigmoid())
    assert "function" in rm.moves() and "function" in rm.explain()
    with pytest.raises(ValueError, match="function"):
        rmfast.RewardModel(model.model, head=lambda x: x[:, 0], invariant=True).score(TEXTS)


def test_a_module_with_several_outputs_is_one_too(model):
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(C.D, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)).double()
    rm = rmfast.RewardModel(model.model.double(), head=head)
    want = torch.stack([head(x[-1]) for x in C.states(model.model, rm.encode(TEXTS))]).detach()
    assert rm.num_labels == 3
    C.assert_near(rm.score(TEXTS), want)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_function_of_a_whole_text_pools_it(model, labels):
    w = C.random(labels, C.D)
    head = FunctionHead(of=lambda x: (x.mean(0) @ w.T.to(x)).squeeze(), reads="text")
    rm = rmfast.RewardModel(model.model, head=head)
    want = torch.stack([(x.mean(0) @ w.T.double()).squeeze() for x in C.states(model.model, rm.encode(TEXTS))])
    for engine in ("packed", "padded"):
        C.assert_near(rm.score(TEXTS, engine=engine), want)
    assert rm.score([]).shape == want[:0].shape
    assert rm.score(TEXTS, output="all")["rewards"].shape == (6, labels)
    with pytest.raises(ValueError, match="The head pools"):
        rm.token_values(TEXTS)
    with pytest.raises(ValueError, match="The head pools"):
        rm.score(TEXTS, positions=[0] * 6)
    with pytest.raises(ValueError, match="The head pools"):
        rmfast.RewardModel(model.model, head=head, pooling="last")


def test_texts_that_are_too_many_rows_are_pooled_in_turn(model, monkeypatch):
    from rmfast.engine import programs

    head = FunctionHead(of=lambda x: x.mean(), reads="text")
    rm = rmfast.RewardModel(model.model, head=head)
    want = rm.score(TEXTS)
    monkeypatch.setattr(programs, "_NUMBERS", 20 * C.D)
    assert torch.equal(rm.score(TEXTS), want)


def test_load_takes_a_function(tmp_path, model):
    model.save_pretrained(tmp_path)
    M.tokenizer("decoder", chat=True).save_pretrained(tmp_path)
    rm = rmfast.load(tmp_path, device="cpu", head=lambda x: x[:, 0])
    want = torch.stack([x[-1, 0] for x in C.states(model.model, rm.encode(C.PAIRS))])
    C.assert_near(rm.score(C.PAIRS), want)


@pytest.mark.parametrize(
    "head, match",
    [
        (lambda x: x @ torch.ones(3), "could not be run"),
        (lambda x: x[:2, 0], r"\(7,\) or \(7, K\)"),
        (lambda x: 1.0, "got float"),
        (lambda x: x[:, 0] > 0, r"got \(7,\)"),
        ("text", "Expected head to be"),
    ],
)
def test_what_is_no_head_is_refused(model, head, match):
    with pytest.raises((TypeError, ValueError), match=match):
        rmfast.RewardModel(model.model, head=head)
