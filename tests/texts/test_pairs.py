"""Preference pairs in the forms that data sets have them; a bad one is named."""

from __future__ import annotations

import pytest

from rmfast.texts.pairs import read_pairs


def test_pairs_are_triples_mappings_and_messages():
    user, good, bad = ({"role": role, "content": text} for role, text in
                       [("user", "Hi"), ("assistant", "Hello!"), ("assistant", "No.")])  # fmt: skip
    expected = ("Hi", "Hello!", "No.")
    for item in [
        ("Hi", "Hello!", "No."),
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "Hi", "chosen": [good], "rejected": [bad]},
        {"prompt": [user], "chosen": "Hello!", "rejected": "No."},
    ]:
        (pair,) = read_pairs([item])
        assert (pair.prompt, pair.chosen, pair.rejected) == expected, item
    assert read_pairs([{"prompt": [user], "chosen": [good], "rejected": [bad]}])[0].inputs == (
        [user, good],
        [user, bad],
    )


def test_tools_and_template_kwargs_of_a_pair_go_with_both_texts():
    own = {"tools": [{"name": "add"}], "chat_template_kwargs": {"style": "terse"}}
    (pair,) = read_pairs([{"prompt": "p", "chosen": "a", "rejected": "b", **own}])
    assert pair.inputs == tuple({"prompt": "p", "response": side, **own} for side in ("a", "b"))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("p", "a", "b")


def test_whole_texts_part_at_the_first_word_that_differs():
    (pair,) = read_pairs([{"chosen": "Q: why? A: Yes it is", "rejected": "Q: why? A: Yesterday"}])
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Q: why? A: ", "Yes it is", "Yesterday")
    assert pair.inputs == ("Q: why? A: Yes it is", "Q: why? A: Yesterday")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "pair 1 has no rejected"),
        (("q", " ", "b"), "pair 1 has no chosen"),
        (("q", "a", 3), "pair 1 has no rejected: got int"),
        (("a", "b"), "pair 1: expected .* got 2 entries"),
        (("q", "a", [{"role": "assistant", "content": "b"}]), "pair 1: expected chosen and rejected both"),
        ((3, "a", "b"), "pair 1: expected prompt as text or messages"),
    ],
)
def test_a_bad_pair_is_named(item, message):
    with pytest.raises(ValueError, match=message):
        read_pairs([("q", "a", "b"), item])


@pytest.mark.parametrize("one", [("q", "a", "b"), {"prompt": "q", "chosen": "a", "rejected": "b"}, "text", 3])
def test_one_pair_is_no_sequence_of_pairs(one):
    with pytest.raises(TypeError, match="Expected pairs to be a sequence"):
        read_pairs(one)
