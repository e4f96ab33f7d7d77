"""The forms that inputs come in: records, tokenizers' results, series and arrays."""

from __future__ import annotations

import models as M
import numpy as np
import pandas as pd
import pytest
import torch

from rmfast.texts.inputs import InputError, encode, several

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]


def run(inputs, tokenizer=None, causal=True, **kw):
    return encode(inputs, tokenizer, causal=causal, vocab_size=M.VOCAB, **kw)


def ids(inputs, tokenizer=None, **kw):
    return [item.ids.tolist() for item in run(inputs, tokenizer, **kw)]


@pytest.mark.parametrize("chat", [False, True])
def test_a_record_is_what_its_columns_say(chat):
    tok = M.tokenizer(chat=chat)
    records = [
        {"prompt": "hi", "response": "there", "id": 3},
        {"text": "hi"},
        {"response": "there"},
        {"input_ids": [5, 6]},
    ]
    assert ids(records, tok) == ids([("hi", "there"), "hi", "there", [5, 6]], tok)
    assert [item.characters for item in run(records, tok)] == [5, 2, 5, None]


def test_a_record_may_hold_messages_on_either_side():
    tok = M.tokenizer(chat=True)
    (want,) = ids([TURNS], tok)
    sides = [("hi", TURNS[1:]), (TURNS[:1], "there"), (TURNS[:1], TURNS[1:]), (TURNS[:1], TURNS), ("hi", TURNS)]
    assert ids([{"prompt": p, "response": r} for p, r in sides], tok) == [want] * 5
    assert ids(sides, tok) == [want] * 5
    assert ids([["hi", TURNS[1:]], {"messages": np.array(TURNS, dtype=object)}, np.array(TURNS)], tok) == [want] * 3


@pytest.mark.parametrize(
    "record, reason",
    [
        (
            {"question": "a", "answer": "b"},
            "expected a record with one of the keys .*response, text, got question, answer",
        ),
        ({}, "expected a record"),
        ({"prompt": "a"}, "expected a record .* got prompt"),
        ({"prompt": "a", "response": None}, "its response is None"),
        ({"prompt": 3, "response": "b"}, "its prompt is 3"),
        ({"text": None}, "its text is None: expected text"),
        ({"text": TURNS}, "its text is .*: expected text"),
        ({"messages": "hi"}, "expected a record with a list of messages, got 'hi'"),
        ({"input_ids": "hi"}, "its input_ids is 'hi': expected a sequence of whole numbers"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "its attention_mask has length 1, its input_ids 2"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "its attention_mask is .*: expected 1 for its tokens"),
        ({"input_ids": [1, 2], "attention_mask": [2, 1]}, "its attention_mask is"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "empty"),
    ],
)
def test_a_record_that_does_not_say_what_to_score_is_named(record, reason):
    with pytest.raises(InputError, match=f"input 1: .*{reason}"):
        run([{"text": "fine"}, record], M.tokenizer(chat=True))


@pytest.mark.parametrize("tensors", [None, "pt", "np"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_result_is_scored_without_its_padding(side, tensors):
    tok = M.tokenizer("encoder", padding_side=side)
    pairs = [("a", "bc"), ("defg", "h"), ("", "i")]
    batch = tok(*map(list, zip(*pairs)), padding=True, return_tensors=tensors)
    want = run(pairs, tok, causal=False)
    for inputs in (batch, dict(batch), [{name: column[i] for name, column in batch.items()} for i in range(3)]):
        got = run(inputs, causal=False)
        assert [item.ids.tolist() for item in got] == [item.ids.tolist() for item in want]
        assert [item.types.tolist() for item in got] == [item.types.tolist() for item in want]


def test_a_tokenizers_result_with_rows_amiss_is_refused():
    with pytest.raises(ValueError, match="Expected inputs with as many rows in each of input_ids, attention_mask"):
        run({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1]]})


def test_a_tokenizers_result_for_one_text_is_one_input():
    tok = M.tokenizer()
    one = tok("ab")
    assert ids([one, tok("ab", return_tensors="pt")], tok) == ids(["ab", "ab"], tok)
    assert not several(one) and several(tok(["ab"])) and several(tok(["ab"], return_tensors="pt"))


@pytest.mark.parametrize("index", [[1, 0], [5, 6], ["x", "y"]])
@pytest.mark.parametrize("values", [["ab", "cd"], [("p", "r"), ("p", "s")], [[1, 2], [3]], [TURNS, TURNS[:1]]])
def test_a_series_is_scored_by_place_not_by_label(values, index):
    tok = M.tokenizer(chat=True)
    series = pd.Series(values, index=index)
    assert ids(series, tok) == ids(values, tok) and several(series)


@pytest.mark.parametrize("dtype", ["U", object])
def test_numpy_strings_are_strings(dtype):
    tok = M.tokenizer()
    assert ids(np.array(["ab", "cd"], dtype=dtype), tok) == ids(["ab", "cd"], tok)
    assert ids(np.array([["p", "r"], ["p", "s"]], dtype=dtype), tok) == ids([("p", "r"), ("p", "s")], tok)
    assert ids([np.array("ab", dtype=dtype), (np.str_("p"), np.str_("r"))], tok) == ids(["ab", ("p", "r")], tok)


def test_a_format_functions_inputs_are_listed_by_place_too():
    tok = M.tokenizer()
    assert ids(pd.Series(["ab", "cd"], index=[1, 0]), tok, format=str.upper) == ids(["AB", "CD"], tok)
    with pytest.raises(TypeError, match="sequence of inputs, got str"):
        ids("ab", tok, format=str.upper)


@pytest.mark.parametrize(
    "inputs, many",
    [
        ("a", False), (("p", "r"), False), (TURNS, False), ([1, 2], False), (torch.tensor([1, 2]), False),
        ({"text": "p"}, False), (["a"], True), ([("p", "r")], True), ([TURNS], True), ([[1, 2]], True),
        ([{"prompt": "p", "response": "r"}], True), (np.array(["a"]), True), (torch.zeros(2, 3, dtype=torch.int), True),
    ],
)  # fmt: skip
def test_one_input_is_told_from_several(inputs, many):
    assert several(inputs) == many
