"""The planner: every token gets the value it has alone, within the budgets, the same from C++ and from Python."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmfast.engine import planner
from rmfast.engine.planner import plan, windows


def flat(texts):
    return np.array([t for text in texts for t in text], np.int64), np.cumsum([0, *map(len, texts)])


def alone(text):
    """Value of each token of a text by itself, through two layers that read all of the layer below."""
    values = list(enumerate(text))
    for _ in range(2):
        values = [hash(tuple(values[: i + 1])) for i in range(len(values))]
    return values


def execute(ids, chunks):
    """What the engine does with a plan, on the layers of `alone`: the values read, in the plan's order."""
    kept: list[list] = [[], []]
    out = []
    for chunk in chunks:
        hidden = list(zip(chunk.positions.tolist(), ids[chunk.tokens].tolist()))
        assert all(len(layer) == chunk.kept for layer in kept)
        for layer in range(2):
            have = kept[layer] + hidden
            pool = [have[row] for row in chunk.pool_rows]
            after = []
            for s, (start, length) in enumerate(zip(chunk.prefix_start, chunk.prefix_len)):
                assert start + length <= len(pool)
                prefix = pool[start : start + length]
                own = hidden[chunk.cu_seqlens[s] : chunk.cu_seqlens[s + 1]]
                after += [hash((*prefix, *own[: i + 1])) for i in range(len(own))]
            kept[layer] = [have[row] for row in chunk.keep_rows]
            hidden = after
        out += [hidden[row] for row in chunk.read_rows]
    assert kept == [[], []]
    return out


def trie_tokens(texts):
    return len({tuple(text[: i + 1]) for text in texts for i in range(len(text))})


# Texts that extend prefixes of earlier ones: nested sharing, duplicates, a text that begins another.
@st.composite
def sharing_texts(draw):
    texts = [draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))]
    for _ in range(draw(st.integers(0, 14))):
        base = draw(st.sampled_from(texts))
        tail = draw(st.lists(st.integers(0, 2), max_size=8))
        texts.append([*base[: draw(st.integers(0, len(base)))], *tail] or [0])
    return texts


budgets = st.fixed_dictionaries(
    {
        "batch_tokens": st.integers(1, 30),
        "keep_tokens": st.integers(0, 20),
        "pool_tokens": st.integers(0, 40),
        "min_shared": st.sampled_from([1, 2, 4, 8, None]),
    }
)


@settings(max_examples=200, deadline=None)
@given(sharing_texts(), budgets)
def test_every_token_gets_the_value_it_has_alone(texts, options):
    ids, cu = flat(texts)
    got = plan(ids, cu, read="all", **options)
    values = execute(ids, got)
    assert [values[i] for i in got.read_index] == [v for text in texts for v in alone(text)]


@settings(max_examples=200, deadline=None)
@given(sharing_texts(), budgets, st.data())
def test_the_token_read_gets_the_value_it_has_alone(texts, options, data):
    ids, cu = flat(texts)
    read = np.array([data.draw(st.integers(0, len(text) - 1)) for text in texts])
    got = plan(ids, cu, read=read, **options)
    values = execute(ids, got)
    assert [values[i] for i in got.read_index] == [alone(text)[p] for text, p in zip(texts, read)]


@settings(max_examples=200, deadline=None)
@given(sharing_texts(), budgets)
def test_budgets_hold_except_for_a_text_longer_than_them_alone_in_its_chunk(texts, options):
    got = plan(*flat(texts), **options)
    keep = min(options["keep_tokens"], options["pool_tokens"])
    for chunk in got:
        assert len(chunk.keep_rows) <= keep
        assert len(chunk.pool_rows) <= options["pool_tokens"]
        if chunk.rows > options["batch_tokens"]:
            assert len(chunk.cu_seqlens) == 2
            assert chunk.positions[-1] + 1 > options["batch_tokens"] + keep
    assert got.stats.peak_kept == max(len(chunk.keep_rows) for chunk in got)
    assert got.stats.peak_pool == max(len(chunk.pool_rows) for chunk in got)
    assert got.stats.peak_rows == max(chunk.rows for chunk in got)


@settings(max_examples=100, deadline=None)
@given(sharing_texts(), st.integers(1, 30))
def test_with_room_to_keep_no_token_is_run_twice(texts, batch_tokens):
    got = plan(*flat(texts), batch_tokens=batch_tokens, keep_tokens=100, pool_tokens=10_000, min_shared=1)
    assert got.stats.rows == sum(chunk.rows for chunk in got) == trie_tokens(texts)


@settings(max_examples=200, deadline=None)
@given(sharing_texts(), budgets, st.sampled_from(["last", "all"]))
def test_cpp_and_python_plan_the_same(texts, options, read):
    if planner._planner is None:
        pytest.skip("rmfast._planner is not built")
    compiled = plan(*flat(texts), read=read, **options)._arrays
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "_planner", None)
        python = plan(*flat(texts), read=read, **options)._arrays
    for field in dataclasses.fields(compiled):
        a, b = getattr(compiled, field.name), getattr(python, field.name)
        np.testing.assert_array_equal(a, b, field.name)
        assert getattr(a, "dtype", int) == getattr(b, "dtype", int), field.name


@settings(max_examples=100, deadline=None)
@given(sharing_texts(), budgets)
def test_each_input_finishes_in_one_chunk(texts, options):
    got = plan(*flat(texts), **options)
    finished = np.concatenate([chunk.inputs for chunk in got])
    assert sorted(finished) == list(range(len(texts)))
    np.testing.assert_array_equal(finished, got.order)
    for c, chunk in enumerate(got):
        reads = got.read_index[chunk.inputs]
        assert ((got.cu_reads[c] <= reads) & (reads < got.cu_reads[c + 1])).all()


def text(seed, length):
    return np.random.default_rng(seed).integers(0, 50_000, length).tolist()


def test_best_of_n_runs_the_prompt_once_in_one_chunk():
    prompt = text(0, 256)
    got = plan(*flat([prompt + text(i + 1, 64) for i in range(16)]), batch_tokens=4096)
    (chunk,) = got
    assert chunk.rows == 256 + 16 * 64
    assert chunk.kept == 0
    np.testing.assert_array_equal(chunk.pool_rows, np.arange(256))


def test_a_pool_holds_the_outer_prefix_once_for_each_inner_one():
    system, prompts = text(0, 100), [text(1, 30), text(2, 40)]
    texts = [system + p + text(10 * i + j, 20) for i, p in enumerate(prompts) for j in range(3)]
    (chunk,) = plan(*flat(texts), batch_tokens=4096)
    assert chunk.rows == 100 + 30 + 40 + 6 * 20
    assert len(chunk.pool_rows) == (100 + 30) + (100 + 40)


def test_tokens_shared_by_chance_after_a_long_prompt_do_not_fill_the_pool():
    rng = np.random.default_rng(0)
    prompt = text(0, 1500)
    texts = [prompt + rng.integers(0, 256, 4).tolist() for _ in range(400)]
    got = plan(*flat(texts), batch_tokens=2048)
    # With a copy of the prompt for each pair that shares one token more: 13 chunks, of 1,652 rows and then of 80 to
    # 140, for 2,898 rows in all; and 15,012 rows in the pool.
    assert [chunk.rows for chunk in got] == [2047, 1051]
    assert got.stats.peak_pool <= 1502


def test_a_nested_prefix_is_shared_from_min_shared_more_tokens_on():
    prompt = text(0, 100)
    for more, rows, pool in ((8, 100 + 3 * (8 + 3 * 5), 3 * 108), (7, 100 + (7 + 3 * 5) + 6 * (7 + 5), 107)):
        texts = [prompt + [branch] * more + text(10 * branch + i, 5) for branch in range(3) for i in range(3)]
        got = plan(*flat(texts), batch_tokens=4096)
        assert (got.stats.rows, got.stats.peak_pool) == (rows, pool)


def test_beginnings_of_one_text_run_it_once_however_small_the_steps():
    whole = text(0, 200)
    (chunk,) = plan(*flat([whole[:n] for n in range(20, 201, 3)]), batch_tokens=4096)
    assert chunk.rows == 200 and len(chunk.pool_rows) == 197


def test_the_pool_ends_no_chunk_that_is_less_than_half_full():
    prompt = text(0, 1500)
    texts = [prompt + text(i + 1, 10) + text(1000 + 2 * i + j, 5) for i in range(200) for j in range(2)]
    got = plan(*flat(texts), batch_tokens=2048)
    # The pool has room for ten prefixes of 1,510 rows, so that chunks after the first had 200 rows. (Half a chunk is
    # 1,024, but for a last pair whose prefix the next one keeps.)
    assert [chunk.rows for chunk in got] == [1700, *[1010] * 5, 100]


def test_without_room_in_the_pool_texts_run_in_full():
    prompt = text(0, 50)
    got = plan(*flat([prompt + text(i + 1, 10) for i in range(10)]), batch_tokens=250, pool_tokens=0)
    assert [chunk.rows for chunk in got] == [180, 180, 180, 60]  # and not 10 chunks of one text


def test_a_shared_beginning_below_min_shared_is_run_again():
    texts = [[7] * 7 + [i] * 5 for i in range(3)]
    assert plan(*flat(texts), batch_tokens=100, min_shared=8).stats.rows == 36
    assert plan(*flat(texts), batch_tokens=100, min_shared=7).stats.rows == 22


def test_duplicates_run_once_even_where_nothing_is_shared():
    got = plan(*flat([[1, 2], [3], [1, 2]]), batch_tokens=10, min_shared=None)
    assert got.stats.rows == 3 and got.stats.distinct == 2
    assert got.read_index[0] == got.read_index[2] != got.read_index[1]


def test_a_long_prefix_is_kept_between_chunks():
    prompt = text(0, 300)
    got = plan(*flat([prompt + text(i + 1, 40) for i in range(50)]), batch_tokens=400)
    assert got.stats.rows == 300 + 50 * 40
    assert got.stats.peak_kept == 300


def test_what_cannot_be_kept_is_run_again():
    prompt = text(0, 300)
    texts = [prompt + text(i + 1, 40) for i in range(4)]
    for keep in (0, 100, 300):  # two chunks of two texts
        got = plan(*flat(texts), batch_tokens=400, keep_tokens=keep)
        assert got.stats.rows == 300 + 4 * 40 + (300 - keep)


def test_a_chunk_ends_where_little_is_shared():
    header = text(0, 20)
    pairs = [header + prompt + text(100 + 2 * i + j, 30) for i in range(10) for j in range(2)
             for prompt in [text(i + 1, 40)]]  # fmt: skip
    got = plan(*flat(pairs), batch_tokens=490)  # four pairs take 20 + 4 · 100 rows, and most of a fifth would fit
    assert [len(chunk.keep_rows) for chunk in got] == [20, 20, 0]


def test_a_chunk_gives_up_at_most_a_quarter_for_that():
    prompt = text(0, 300)
    got = plan(*flat([[0] * 10] + [[1, *prompt, *text(i + 1, 40)] for i in range(20)]), batch_tokens=400)
    assert got[0].rows == 10 + 341 + 40


def test_a_text_fills_a_chunk_that_would_be_less_than_half_full():
    got = plan(*flat([[0] * 4, [1] * 9, [2] * 6]), batch_tokens=10)
    assert [chunk.rows for chunk in got] == [10, 9]
    assert [len(chunk.keep_rows) for chunk in got] == [6, 0]


def test_a_text_over_the_budget_is_cut_and_its_beginning_kept():
    got = plan(*flat([text(0, 25)]), batch_tokens=10)
    assert [chunk.rows for chunk in got] == [25]  # 10 + 10 rows can be run and kept, not 25
    got = plan(*flat([text(0, 25)]), batch_tokens=10, keep_tokens=15)
    assert [chunk.rows for chunk in got] == [10, 5, 10]
    assert [len(chunk.keep_rows) for chunk in got] == [10, 15, 0]
    assert [len(chunk.read_rows) for chunk in got] == [0, 0, 1]


def test_strict_names_the_budget_that_a_text_needs():
    with pytest.raises(ValueError, match=r"at least 25, the tokens of input 1; got 10 \+ 14"):
        plan(*flat([[1], text(0, 25)]), batch_tokens=10, keep_tokens=14, strict=True)
    assert len(plan(*flat([[1], text(0, 25)]), batch_tokens=10, keep_tokens=15, strict=True)) == 3


def test_tokens_after_the_read_position_are_not_run():
    got = plan(*flat([[5, 6, 7, 0, 0], [8, 0]]), batch_tokens=10, read=np.array([2, 0]))
    assert got.stats.rows == 4 and got.stats.tokens == 7


def test_no_inputs_make_no_chunks():
    got = plan(np.empty(0, np.int64), np.array([0]), batch_tokens=10)
    assert len(got) == 0 and list(got) == [] and got.stats.saved == 0


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_may_be_int32_or_int64_strided(dtype):
    ids, cu = flat([[1, 2, 3], [1, 2, 4]])
    wide = np.repeat(ids, 2).astype(dtype)[::2]
    assert plan(wide, cu.astype(dtype), batch_tokens=10, min_shared=1).stats.rows == 4


@pytest.mark.parametrize("error, match, change", [
    (ValueError, "at least one token, got 0 for input 1", {"cu_seqlens": np.array([0, 2, 2, 4])}),
    (ValueError, r"from 0 to len\(ids\) = 4", {"cu_seqlens": np.array([0, 3])}),
    (ValueError, r"cu_seqlens to go from 0", {"cu_seqlens": np.array([1, 4])}),
    (ValueError, r"at least one token, got -1 for input 1", {"cu_seqlens": np.array([0, 3, 2, 4])}),
    (ValueError, r"ids to be in \[0, 2\*\*31\), got -1", {"ids": np.array([-1, 0, 0, 0])}),
    (ValueError, r"ids to be in \[0, 2\*\*31\), got 0 to 2147483648", {"ids": np.array([2**31, 0, 0, 0])}),
    (TypeError, "ids to be a 1-D array of integers, got 1-D of float64", {"ids": np.zeros(4)}),
    (TypeError, "cu_seqlens to be a 1-D array of integers, got 2-D", {"cu_seqlens": np.array([[0, 4]])}),
    (ValueError, "batch_tokens to be an int of at least 1, got 0", {"batch_tokens": 0}),
    (ValueError, "keep_tokens to be an int of at least 0, got -1", {"keep_tokens": -1}),
    (ValueError, "pool_tokens to be an int of at least 0, got 1.5", {"pool_tokens": 1.5}),
    (ValueError, "min_shared to be an int of at least 1, got 0", {"min_shared": 0}),
    (ValueError, 'read to be "last", "all" or positions, got \'first\'', {"read": "first"}),
    (ValueError, r"read to be in \[0, 2\) for input 1, got 2", {"read": np.array([0, 2])}),
    (ValueError, "one read position for each of 2 inputs, got 1", {"read": np.array([0])}),
])  # fmt: skip
def test_bad_arguments_are_named(error, match, change):
    args = {"ids": np.arange(4), "cu_seqlens": np.array([0, 2, 4]), "batch_tokens": 10, **change}
    with pytest.raises(error, match=match):
        plan(**args)


def test_a_window_ends_with_the_input_that_brings_it_to_its_tokens(monkeypatch):
    monkeypatch.setattr(planner, "_WINDOW_TOKENS", 10)
    assert list(windows([4, 4, 4, 10, 25, 1, 2])) == [range(0, 3), range(3, 4), range(4, 5), range(5, 7)]
    assert list(windows([4, 6])) == [range(2)]
    assert list(windows([])) == []
