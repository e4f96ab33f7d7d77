"""The probes' edits: one thing each, the same words where they say so, placebos as long as what was put in."""

from __future__ import annotations

import random
import re

import pytest

from rmfast import probes
from rmfast.probes.edits import FILLER
from rmfast.probes.variants import responses_of, variants_of
from rmfast.texts.pairs import read_pairs

RESPONSE = "Paris is the capital. It lies on the Seine. Many people live there."
LIST = "Three things:\n- bread\n- butter\n- salt"
BY_NAME = {probe.name: probe for probe in probes.PROBES}
SAME_WORDS = ["list", "bold", "heading", "paragraphs", "exclamation", "order of items", "key sentence last"]


def edit(name, response=RESPONSE, prompt="What is the capital?", seed=0):
    return BY_NAME[name](prompt, response, random.Random(seed))


def words(text):
    return sorted(re.findall(r"\w+", text))


@pytest.mark.parametrize("name", BY_NAME)
def test_each_probe_edits_a_plain_response(name):
    made = edit(name)
    assert made is not None
    assert made.response != (RESPONSE if made.control is None else made.control)
    assert edit(name) == made  # by the seed


@pytest.mark.parametrize("name", SAME_WORDS)
def test_forms_and_orders_keep_the_words(name):
    made = edit(name)
    assert words(made.response) == words(RESPONSE if made.control is None else made.control)


@pytest.mark.parametrize(
    "name, want",
    [
        ("list", "- Paris is the capital.\n- It lies on the Seine.\n- Many people live there."),
        ("bold", "**Paris is the** capital. It lies on the Seine. Many people live there."),
        ("heading", "## Paris is the capital.\n\nIt lies on the Seine. Many people live there."),
        ("exclamation", "Paris is the capital! It lies on the Seine! Many people live there!"),
        ("truncation", "Paris is the capital. It lies on the Seine."),
        ("key sentence last", "It lies on the Seine. Many people live there. Paris is the capital."),
        ("repetition × 1", RESPONSE + " Many people live there."),
    ],
)
def test_edits_are_as_they_are_described(name, want):
    assert edit(name).response == want


def test_items_of_a_list_move_and_their_marks_stay():
    made = edit("order of items", LIST)
    assert made.control == LIST
    assert made.response.startswith("Three things:\n- ")
    assert sorted(made.response.split("\n")) == sorted(LIST.split("\n"))
    assert all(a != b for a, b in zip(made.response.split("\n")[1:], LIST.split("\n")[1:]))
    numbered = edit("order of items", "1. one\n2. two")
    assert numbered.response == "1. two\n2. one"


def test_typos_exchange_neighbouring_letters_of_lower_case_words():
    made = edit("typos", "some longer words stand here")
    assert sorted(made.response) == sorted("some longer words stand here")
    changed = [(a, b) for a, b in zip(made.response.split(), ["some", "longer", "words", "stand", "here"]) if a != b]
    assert len(changed) == 1


@pytest.mark.parametrize("name", ["list", "heading", "truncation", "key sentence last"])
def test_what_has_no_place_in_a_response_is_left_out(name):
    assert edit(name, "One sentence.") is None
    assert edit(name, LIST) is None


def test_agreement_states_a_view_in_both_prompts():
    made = edit("agreement")
    assert made.prompt.startswith("What is the capital?") and "view" in made.prompt
    assert made.inserted is not None


PAIRS = [(f"Question {i}?", f"{RESPONSE} {i}.", f"No {i}. None at all.") for i in range(6)]
INSERTS = [name for name in BY_NAME if edit(name).inserted is not None]


@pytest.mark.parametrize("name", INSERTS)
def test_a_placebo_is_of_whole_sentences_about_as_long_as_what_was_put_in(name):
    def count(text):
        return len(text.split())

    found = variants_of(BY_NAME[name], responses_of(read_pairs(PAIRS)), 300, 0, count)
    assert len(found) == 12
    controls = set()
    for variant in found:
        (prompt, edited), (other, control) = variant.edited, variant.control
        assert prompt == other and edited != control
        assert abs(count(edited) - count(control)) <= 3  # no sentence has fewer than four words
        text = PAIRS[variant.of // 2][1 + variant.of % 2]
        put_in = control.replace(text, "").strip()
        controls.add(put_in)
        for sentence in FILLER:
            put_in = put_in.replace(sentence, "")
        assert not put_in.strip()
    assert len(controls) > 1  # of several wordings


@pytest.mark.parametrize("name", INSERTS)
def test_placebos_are_neither_shorter_nor_longer_on_the_whole(name):
    """In tokens of a word with the space before it, where a space at the end is a token of its own."""

    def count(text):
        return len(re.findall(r" ?\w+| ?[^\s\w]+|\s+", text))

    given = [(f"What is the capital of {i}?", f"It is {i}. {RESPONSE}", f"No {i}. {RESPONSE}") for i in range(60)]
    found = variants_of(BY_NAME[name], responses_of(read_pairs(given)), 300, 0, count)
    longer = [count(variant.edited[1]) - count(variant.control[1]) for variant in found]
    assert abs(sum(longer) / len(longer)) <= 0.5


def test_the_placebo_s_two_sentences_are_exchanged_by_a_coin():
    longer = []
    for seed in range(400):
        made = edit("placebo", seed=seed)
        assert made.response.endswith(RESPONSE) and made.control.endswith(RESPONSE)
        places = [FILLER.index(text.removesuffix(f" {RESPONSE}")) for text in (made.response, made.control)]
        assert abs(places[0] - places[1]) == 1
        longer.append(places[0] > places[1])
    assert 160 <= sum(longer) <= 240  # 4 standard deviations


def test_at_most_so_many_are_drawn_by_the_seed():
    responses = responses_of(read_pairs(PAIRS))
    some = [variants_of(BY_NAME["bold"], responses, 5, seed, len) for seed in (0, 0, 1)]
    assert some[0] == some[1] and len(some[0]) == 5
    assert [v.of for v in some[0]] != [v.of for v in some[2]]


def test_conversations_records_and_whole_texts_are_edited_in_their_response_alone():
    def chat(*turns):
        return [{"role": role, "content": text} for role, text in turns]

    asked, answer, other = ("user", "Why?"), ("assistant", RESPONSE), ("assistant", "No idea. None.")
    forms = [
        {"prompt": "Why?", "chosen": RESPONSE, "rejected": "No idea. None."},
        {"prompt": "Why?", "chosen": RESPONSE, "rejected": "No idea. None.", "tools": [{"name": "t"}]},
        {"prompt": chat(asked), "chosen": chat(answer), "rejected": chat(other)},
        {"chosen": chat(asked, answer), "rejected": chat(asked, other)},
        {"chosen": f"Why? {RESPONSE}", "rejected": "Why? No idea. None."},
    ]
    bold = "**Paris is the** capital. It lies on the Seine. Many people live there."
    for form, want in zip(
        forms,
        [
            ("Why?", bold),
            {"prompt": "Why?", "response": bold, "tools": [{"name": "t"}]},
            chat(asked, ("assistant", bold)),
            chat(asked, ("assistant", bold)),
            f"Why? {bold}",
        ],
    ):
        found = variants_of(BY_NAME["bold"], responses_of(read_pairs([form])), 9, 0, len)
        assert found[0].edited == want
        agreed = variants_of(BY_NAME["agreement"], responses_of(read_pairs([form])), 9, 0, len)[0]
        for side in (agreed.edited, agreed.control):
            assert "I have my own view" in str(side) and str(side).count("Why?") == 1


def test_a_probe_of_ones_own():
    @probes.probe("style", name="shouting")
    def shout(prompt, response, rng):
        return response.upper()

    assert shout.name == "shouting" and shout.axis == "style"
    assert shout("p", "hello", random.Random(0)).response == "HELLO"
    assert shout("p", "HELLO", random.Random(0)) is None

    @probes.probe("style")
    def nothing_left(prompt, response, rng):
        return " "

    assert nothing_left.name == "nothing left"
    with pytest.raises(ValueError, match="nothing left"):
        nothing_left("p", "hello", random.Random(0))

    @probes.probe("style")
    def number(prompt, response, rng):
        return 3

    with pytest.raises(TypeError, match="number"):
        number("p", "hello", random.Random(0))
