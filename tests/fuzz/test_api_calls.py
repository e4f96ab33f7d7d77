"""Malformed calls of everything that is public: a right result, or an error that names the argument."""

from __future__ import annotations

import inspect
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import api_calls
import numpy as np
import pytest
import torch
from matplotlib import pyplot

import rmfast

# What a call may end in. InputError is a ValueError that has the input's place in the argument of texts.
ERRORS = (ValueError, TypeError, ImportError, FileNotFoundError, rmfast.BackendError)
OF_FILES = ("path", "path_or_id", "folder", "checkpoint")

# Made anew for each call: generators run out.
WRONG: list[Callable[[], Any]] = [
    *((lambda value=value: value) for value in (
        None, True, False, 0, 1, -1, 2, 7, 10**30, -(10**30), 2**63, 1.0, 1.5, 0.5, -0.5, float("nan"), float("inf"),
        -float("inf"), 1e300, 1j, "", "last", "all", "abc", "0", "q", b"bytes", Decimal("0.5"), ..., object(), int,
        [], (), {}, set(), {0}, frozenset({"a"}), [1.5], [True], [None], [float("nan")], [[]], ["a"], [""], [0, 1],
        [0, 0], [1, 2, 3], [10**30], [-(10**20)], ["a", 1], [[0, 1]], [{}], ("a", "b"), {"a": 1}, {0: 0}, {1.5: True},
        {0: None}, {None: 0}, {"a": ([0], [1.0])}, [1.5, True], [0, True], [1.9, 0], range(0), range(2), slice(0, 1),
        np.float64(1.5), np.float32("nan"), np.int64(1), np.int8(0), np.bool_(True), np.str_("a"), np.array(3),
        np.array(1.5), np.array([1.5]), np.array([]), np.array([True, False]), np.array(["a", "b"]),
        np.array([0, 1]), np.array([None]), np.zeros((2, 2)), np.zeros((2, 2), int), Path("nowhere"),
        lambda *_: None, "\ud800", ["\ud800"], "a\0b",
    )),
    *((lambda value=value: value) for value in (
        torch.tensor(1), torch.tensor(1.5), torch.tensor(True), torch.tensor([True, False]), torch.zeros(0),
        torch.zeros(2), torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([0.5, float("nan")]),
        torch.zeros(6, dtype=torch.complex64), torch.zeros(2, device="meta"), torch.zeros(2, requires_grad=True),
    )),
    lambda: (i for i in [0]),
    lambda: iter(["a text"]),
    lambda: map(str, [1]),
    lambda: {"a": 1}.items(),
]  # fmt: skip


def variants(right: Any) -> Iterator[Callable[[], Any]]:
    """Wrong values, and a right sequence or mapping with one of its entries wrong."""
    yield from WRONG
    for wrong in WRONG:
        if isinstance(right, list | tuple) and right:
            yield lambda wrong=wrong: type(right)([*right[:-1], wrong()])
        if isinstance(right, dict) and right:
            yield lambda wrong=wrong: {**right, next(iter(right)): wrong()}
    if isinstance(right, list | tuple):
        yield from (
            lambda: [*right, *right],
            lambda: right[:-1],
            lambda: (x for x in right),
            lambda: dict.fromkeys(range(2), right),
        )
    if isinstance(right, torch.Tensor):
        yield from (
            right.tolist, right.numpy, right.half, right.long, right.bool, right.neg, lambda: right[:-1],
            lambda: right[None], lambda: right.to("meta"), lambda: right * float("nan"),
        )  # fmt: skip


# That many resamples or trials would run for as long as was asked.
ENDLESS = ("resamples", "trials", "permutations")


def trials() -> Iterator[tuple[api_calls.Call, str, Callable[[], Any]]]:
    for call in api_calls.calls():
        for argument, right in call.given.items():
            for make in variants(right):
                value = make() if argument in ENDLESS else None
                if not (isinstance(value, int) and value > 10_000):
                    yield call, argument, make


def names(call: api_calls.Call, argument: str, value: Any, right: bool) -> list[str]:
    """What an error may call an argument: its name, a path itself; of a right value another that it does not fit to."""
    also = {"functions": ["attribute"], "attributes": ["attribute"], "pairs": ["pair"], "items": ["item"]}.get(
        argument, []
    )
    return [argument, *also, *([str(value)] if argument in OF_FILES else []), *(call.given if right else [])]


def named(name: str, message: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}", message) is not None


def short(value: Any) -> str:
    return re.sub(r" at 0x\w+", "", repr(value)[:100])


def told(error: Exception) -> str:
    last = inspect.trace()[-1]
    return f"{type(error).__name__}: {str(error)[:160]!r} ({Path(last.filename).name}:{last.lineno})"


def fault(call: api_calls.Call, argument: str, make: Callable[[], Any]) -> str | None:
    """What is wrong with how a call ends, or None."""
    value, right = make(), call.right[argument](make())
    shown = f"{call.name}({argument}={short(value)})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.function(**{**call.given, argument: value})
    except ERRORS as error:
        known = names(call, argument, value, right)
        if isinstance(error, rmfast.InputError) or any(named(name, str(error)) for name in known):
            return None
        return f"{shown}: without its name, {told(error)}"
    except OSError as error:
        return None if argument in OF_FILES else f"{shown}: {told(error)}"
    except Exception as error:
        return f"{shown}: {told(error)}"
    finally:
        pyplot.close("all")
    return None if right else f"{shown}: taken"


def faults(some: list) -> list[str]:
    return [found for trial in some if (found := fault(*trial)) is not None]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Files are written into a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


def test_right_calls_run():
    """So that what a malformed one ends in is its argument's doing."""
    for call in api_calls.calls():
        call.function(**call.given)
        assert all(call.right[name](value) for name, value in call.given.items()), call.name


def test_a_malformed_call_ends_in_an_error_that_names_the_argument():
    every = list(trials())
    count = int(os.environ.get("FUZZ_CALLS", 5000))
    some = random.Random(int(os.environ.get("FUZZ_SEED", 0))).sample(every, min(count, len(every)))
    assert faults(some) == []
