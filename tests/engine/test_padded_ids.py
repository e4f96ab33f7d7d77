"""Token ids that come padded: said, and left out where their attention mask is given."""

from __future__ import annotations

import warnings

import models as M
import pytest
import torch

import rmfast

TEXTS = ["a longer text", "a text", "no"]


@pytest.fixture(scope="module")
def rm():
    return rmfast.RewardModel(M.decoder(), M.tokenizer(padding_side="left"))


def fresh(pooling="auto", tokenizer=None, **kw):
    return rmfast.RewardModel(M.decoder(**kw), tokenizer, pooling=pooling)


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_a_padded_batch_with_its_mask_scores_as_its_texts(rm, tensors):
    batch = rm.tokenizer(TEXTS, padding=True, return_tensors=tensors)
    torch.testing.assert_close(rm.score(batch), rm.score(TEXTS), rtol=0, atol=0)
    assert [len(v) for v in rm.token_values(batch)] == [len(v) for v in rm.token_values(TEXTS)]


def test_left_padded_ids_are_said_once():
    made = fresh()
    with pytest.warns(UserWarning, match="Input 1 begins with token 258, which is padding.*attention_mask"):
        made.score([[5, 6], [M.PAD, 6]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.score([[M.PAD, 6]])


@pytest.mark.parametrize(
    "ids, kw",
    [
        ([M.BOS, 5], {}),
        ([M.EOS, 5], {"pad_token_id": M.EOS, "bos_token_id": M.EOS}),  # GPT-2's: one begins a text
        ([5, 6, M.EOS], {"pad_token_id": M.EOS, "pooling": "last"}),  # one ends it
        ([M.PAD], {"pooling": "last"}),
    ],
)
def test_a_text_that_only_looks_padded_is_not(ids, kw):
    made = fresh(**kw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.score([ids])


def test_ids_padded_at_the_right_are_said_where_the_pads_are_read():
    with pytest.warns(UserWarning, match="Input 0 ends with token 258, which is padding"):
        fresh(pooling="last").score([[5, 6, M.PAD, M.PAD]])
    with pytest.warns(UserWarning, match="Input 0 begins with token 257, which is padding"):
        fresh(pad_token_id=M.EOS, bos_token_id=M.EOS).score([[M.EOS, M.EOS, 5, 6]])


def test_template_kwargs_and_tools_reach_every_workload(rm):
    tok = M.tokenizer(chat=True)
    tok.chat_template = "{{ style }}{{ tools[0].name }}" + M.TEMPLATE
    made = rmfast.RewardModel(M.decoder(), tok)
    turns, other = ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": x}] for x in ("so", "no"))
    given = {"tools": [{"name": "add"}], "chat_template_kwargs": {"style": "terse"}}
    ids, others = made.encode([turns, other], **given)
    assert tok.decode(ids.ids).startswith("terseadd<s>")
    for call in (made.score, made.token_values, made.lens):
        got, want = call([turns], **given), call([ids])
        torch.testing.assert_close(getattr(got, "rewards", got), getattr(want, "rewards", want), rtol=0, atol=0)
    assert made.attribute(turns, **given).tokens == made.attribute(ids).tokens
    assert made.patch_sweep(turns, other, **given).tokens == made.patch_sweep(ids, others).tokens
    start = made.values_and_reward([turns], **given).response_start.item()
    assert tok.decode(ids.ids[start:]) == "<assistant>so</s>"
