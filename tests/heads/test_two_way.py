"""Qwen2.5-Math-PRM's head: two logits at the end of each step, the softmax's second."""

from __future__ import annotations

import headed as C
import models as M
import pytest
import torch

import rmfast
from rmfast.texts.inputs import InputError


def tokenizer_with_steps():
    tokenizer = M.tokenizer("decoder", chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    return tokenizer


def test_qwen_math_prm_scores_as_published(tmp_path):
    body = C.body("qwen2")
    tensors = C.linears("score", C.D, 40, 2, numbers=(0, 2))
    tokenizer = tokenizer_with_steps()
    step = tokenizer.convert_tokens_to_ids("<extra_0>")
    C.write(tmp_path, body, tensors, tokenizer=tokenizer, architectures=["Qwen2ForProcessRewardModel"], num_labels=2)
    rm = rmfast.load(tmp_path, device="cpu")
    assert rm.pooling == step and rm.num_labels == 1
    pairs = [("1 + 1", "one<extra_0>two<extra_0>"), ("2 + 2", "four<extra_0>, surely"), ("x", "y<extra_0>")]
    encoded = rm.encode(pairs)
    wanted, every = [], []
    for item, x in zip(encoded, C.states(body, encoded)):
        right = C.layered(tensors, "score", (0, 2), torch.relu, x).softmax(-1)[:, 1]
        every.append(right)
        wanted.append(right[(item.ids == step).nonzero()[0][-1]])
    C.assert_alike(rm, pairs, torch.stack(wanted))
    for got, want in zip(rm.token_values(pairs), every):
        C.assert_near(got, want)
    assert rm.score(pairs, output="all")["logits"].shape == (3, 2)
    with pytest.raises(InputError, match=f"token id {step}"):
        rm.score([("a", "b")])
