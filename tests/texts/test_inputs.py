"""Formatting, tokenising, checking and truncating inputs."""

from __future__ import annotations

import models as M
import numpy as np
import pandas as pd
import pytest
import torch

from rmfast.texts.inputs import Encoded, InputError, encode


def run(inputs, tokenizer=None, causal=True, **kw):
    return encode(inputs, tokenizer, causal=causal, vocab_size=M.VOCAB, **kw)


def ids(inputs, tokenizer=None, **kw):
    return [item.ids.tolist() for item in run(inputs, tokenizer, **kw)]


def text(tokenizer, encoded):
    return tokenizer.decode(encoded)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_token_ids_come_as_lists_arrays_or_tensors(make):
    assert ids([make([5, 6, 7]), make([8])]) == [[5, 6, 7], [8]]


def test_a_string_is_tokenised_with_the_tokenizers_own_special_tokens():
    tok = M.tokenizer("decoder")
    assert ids(["hello"], tok) == [tok("hello")["input_ids"]]
    assert ids(["hello"], tok)[0][0] == M.BOS


@pytest.mark.parametrize("kind", ["decoder", "plain"])
def test_a_chat_template_is_used_for_pairs_and_writes_one_bos(kind):
    tok = M.tokenizer(kind, chat=True)
    (got,) = ids([("hi", "there")], tok)
    assert text(tok, got) == "<s><user>hi</s><assistant>there</s>"
    assert got.count(M.BOS) == 1
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    assert got == tok.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_a_string_that_begins_with_bos_gets_no_second_one():
    tok = M.tokenizer("decoder")
    assert ids(["<s>hello"], tok) == ids(["hello"], tok)


def test_messages_are_rendered_by_the_template():
    tok = M.tokenizer("decoder", chat=True)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert text(tok, ids([chat], tok)[0]) == "<s><user>a</s><assistant>b</s><user>c</s>"


def test_a_pairs_prompt_may_be_messages():
    tok = M.tokenizer("decoder", chat=True)
    assert ids([([{"role": "user", "content": "hi"}], "there")], tok) == ids([("hi", "there")], tok)


def test_without_a_template_a_decoder_concatenates():
    tok = M.tokenizer("decoder")
    assert ids([("ab", "cd")], tok) == ids(["abcd"], tok)


def test_without_a_template_an_encoder_encodes_the_pair_with_types():
    tok = M.tokenizer("encoder")
    (got,) = run([("ab", "cd")], tok, causal=False)
    want = tok("ab", "cd")
    assert got.ids.tolist() == want["input_ids"]
    assert got.types.tolist() == want["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_format_overrides_the_template():
    tok = M.tokenizer("decoder", chat=True)
    assert ids([("ab", "cd")], tok, format="concat") == ids(["abcd"], tok)
    assert ids([("ab", "cd")], tok, format="pair") == [tok("ab", "cd")["input_ids"]]


def test_format_chat_fails_without_a_template():
    with pytest.raises(InputError, match=r"input 0: .*chat template"):
        run([("ab", "cd")], M.tokenizer("decoder"), format="chat")


def test_format_as_a_function_may_return_any_input():
    tok = M.tokenizer("decoder")
    assert ids([("ab", "cd")], tok, format=lambda pair: f"{pair[1]}|{pair[0]}") == ids(["cd|ab"], tok)
    assert ids([{"ids": [3, 4]}, {"ids": [5]}], format=lambda row: row["ids"]) == [[3, 4], [5]]


def test_mixed_inputs_keep_their_order():
    tok = M.tokenizer("decoder", chat=True)
    got = ids(["x", [1, 2], ("p", "r"), "<s>y", Encoded(np.array([9]))], tok)
    assert [g[0] for g in got] == [M.BOS, 1, M.BOS, M.BOS, 9]
    assert got[3] == ids(["y"], tok)[0]


def test_encoded_inputs_are_scored_as_they_are():
    tok = M.tokenizer("encoder")
    first = run([("ab", "cd")], tok, causal=False)
    (again,) = run(first, tok, causal=False)
    assert again.ids.tolist() == first[0].ids.tolist() and again.types.tolist() == first[0].types.tolist()


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("", "empty"),
        ([], "empty"),
        (("", ""), "empty"),
        (np.array([], dtype=np.int64), "empty"),
        ([3, 300], "token id 300 at position 1 is outside of \\[0, 272\\)"),
        ([3, 10**22], "token id 10000000000000000000000 is outside of any vocabulary"),
        ([-1], "token id -1 at position 0"),
        (None, "expected a string, .* got NoneType"),
        (3.5, "got float"),
        ([1.5, 2.5], "got list"),
        ([True, False], "got list"),
        (torch.zeros(2, 2, dtype=torch.long), "got Tensor"),
        (("a", None), "its response is None: expected text or a list of messages"),
        (("a", float("nan")), "its response is nan: expected text"),
        ((None, "a"), "its prompt is None"),
        (["a", 7], "its response is 7"),
        (("a", "b", "c"), "got tuple of 3"),
        (np.array([0.5, 1.5]), "got list of 2"),
        ([["a", "b"], ["c", "d"]], "got list of 2"),
        ([{"role": "user", "content": "x"}], "chat template"),
        ("\ud800", "."),
    ],
)
def test_a_bad_input_is_named_by_its_position_and_reason(bad, reason):
    with pytest.raises(ValueError, match=f"input 1: .*{reason}") as caught:
        run(["fine", bad, ""], M.tokenizer("decoder"))
    assert caught.value.index == 1


def test_text_without_a_tokenizer_is_an_error():
    with pytest.raises(InputError, match="input 0: text needs a tokenizer"):
        run(["hello"])


def test_an_error_of_the_template_names_its_input():
    tok = M.tokenizer("decoder", chat=True)
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"input 1: .*roles must alternate"):
        run(["x", ("a", "b")], tok)


def test_errors_can_be_returned_in_place_of_results():
    got = run(["fine", "", [1, 999], "fine too", None], M.tokenizer("decoder"), errors="return")
    assert [isinstance(item, InputError) for item in got] == [False, True, True, False, True]
    assert [item.index for item in got if isinstance(item, InputError)] == [1, 2, 4]


@pytest.mark.parametrize(
    "inputs",
    [
        "a text",
        ("prompt", "response"),
        [{"role": "user", "content": "x"}],
        [1, 2, 3],
        torch.tensor([1, 2]),
        torch.tensor(1),
        np.array("a text"),
        {"a": 1},
        {"prompt": "a", "response": "b"},
        {"input_ids": [1, 2], "attention_mask": [1, 1]},
        {"a text", "another"},
        pd.DataFrame({"prompt": ["a"], "response": ["b"]}),  # its iteration gives columns
        3,
    ],
)
def test_one_bare_input_in_place_of_a_sequence_is_refused(inputs):
    with pytest.raises(TypeError, match=r"sequence of inputs"):
        run(inputs, M.tokenizer("decoder", chat=True))


@pytest.mark.parametrize(
    "kw", [{"truncation": "both"}, {"format": "json"}, {"max_length": 0}, {"errors": "ignore"}], ids=lambda kw: str(kw)
)
def test_wrong_options_are_refused(kw):
    with pytest.raises(ValueError, match=f"Expected {next(iter(kw))}"):
        run(["x"], M.tokenizer("decoder"), **kw)


def test_too_long_is_an_error_by_default():
    with pytest.raises(InputError, match="input 1: it has 5 tokens, over max_length=4"):
        run([[1, 2, 3, 4], [1, 2, 3, 4, 5]], max_length=4)


def test_truncation_cuts_the_named_side():
    assert ids([[1, 2, 3, 4, 5]], max_length=3, truncation="left") == [[3, 4, 5]]
    assert ids([[1, 2, 3, 4, 5]], max_length=3, truncation="right") == [[1, 2, 3]]


def test_truncation_keeps_bos():
    tok = M.tokenizer("decoder", chat=True)
    assert text(tok, ids(["abcdef"], tok, max_length=3, truncation="left")[0]) == "<s>ef"
    assert text(tok, ids([("abc", "def")], tok, max_length=3, truncation="left")[0]) == "<s>f</s>"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("n", range(4, 16))
def test_truncating_a_pair_is_the_tokenizers_longest_first(side, n):
    tok = M.tokenizer("encoder", truncation_side=side)
    pair = ("abcdefgh", "uvw")
    (got,) = run([pair], tok, causal=False, max_length=n, truncation=side)
    want = tok(*pair, truncation="longest_first", max_length=n)
    assert len(got) == min(n, 14)
    if n >= 9:  # below, both parts are cut evenly, and which one loses the odd token is an implementation's choice
        assert got.ids.tolist() == want["input_ids"]
        assert got.types.tolist() == want["token_type_ids"]
    assert got.ids[0] == M.CLS and got.ids[-1] == M.SEP and (got.ids == M.SEP).sum() == 2


def test_no_room_beside_special_tokens_is_an_error():
    with pytest.raises(InputError, match="leaves no room"):
        run([("ab", "cd")], M.tokenizer("encoder"), causal=False, max_length=3, truncation="right")


def test_encoding_leaves_the_tokenizer_as_it_was():
    tok = M.tokenizer("encoder", truncation_side="right", padding_side="left")
    run([("abcdef", "gh")], tok, causal=False, max_length=6, truncation="left")
    assert (tok.truncation_side, tok.padding_side) == ("right", "left")
    assert len(tok("abcdef", "gh")["input_ids"]) == 11
