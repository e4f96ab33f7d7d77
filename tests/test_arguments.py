"""Each kind of argument: what is right comes back in plain Python, all else is refused by name."""

from __future__ import annotations

import models as M
import numpy as np
import pytest
import torch

import rmfast
from rmfast import arguments, losses, values

NAN = float("nan")


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_an_int_is_python_s_or_numpy_s(value):
    found = arguments.whole("n", value, 1)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize(
    "check, value, message",
    [
        (arguments.whole, True, "Expected n to be an int, got True"),
        (arguments.whole, 1.0, "Expected n to be an int, got 1.0"),
        (arguments.number, NAN, "Expected n to be a finite number, got nan"),
        (arguments.number, False, "Expected n to be a finite number, got False"),
        (arguments.number, "1", "Expected n to be a finite number, got '1'"),
        (arguments.flag, 1, "Expected n to be True or False, got 1"),
        (arguments.flag, "no", "Expected n to be True or False, got 'no'"),
        (arguments.sequence, "text", "Expected n to be a sequence, got 'text'"),
        (arguments.sequence, {1, 2}, "Expected n to be a sequence, got {1, 2}"),
        (arguments.array, [1.5, True], "Expected n to be real numbers, got"),
        (
            arguments.array,
            torch.zeros(2, dtype=torch.complex64),
            "Expected n to be real numbers, got a tensor of shape",
        ),
        (arguments.finite, [1.0, NAN], "Expected n to be finite, got nan"),
        (arguments.path, "", "Expected n to be a path, got ''"),
        (arguments.path, 1, "Expected n to be a path, got 1"),
    ],
)
def test_what_is_not_of_a_kind_is_refused_by_name(check, value, message):
    with pytest.raises((TypeError, ValueError)) as error:
        check("n", value)
    assert str(error.value).startswith(message)


@pytest.fixture(scope="module")
def rm():
    return rmfast.RewardModel(M.decoder("llama"), M.tokenizer())


PAIR = ("a text", "b text")
REFUSED = {
    "a text for baseline": lambda rm: rm.patch_sweep("a text", mode="mean", baseline="a text"),
    "a float among positions": lambda rm: rm.patch_sweep(*PAIR, positions=[1.5, True]),
    "a bool among positions": lambda rm: rm.patch_sweep(*PAIR, positions=[0, True]),
    "a float in align": lambda rm: rm.patch_sweep(*PAIR, align={0: 0, 1: 1.5}),
    "heads of what has none for heads": lambda rm: rm.patch_sweep(*PAIR, sites="resid_post", heads=[99]),
    "a float among response_start": lambda rm: rm.values_and_reward([[1, 2, 3]], response_start=[1.9]),
    "NaN among rewards": lambda rm: rm.values_and_reward([[1, 2, 3]], response_start=[1], rewards=[[0.0, NAN]]),
    "NaN for gamma": lambda rm: rm.values_and_reward([[1, 2, 3]], response_start=[1], gamma=NAN),
    "a bool for max_length": lambda rm: rm.score(["a"], max_length=True),
    "a float among positions of score": lambda rm: rm.score(["abc"], positions=[1.0]),
    "a text for progress": lambda rm: rm.score(["abc"], progress="no"),
    "a bool for a layer in select": lambda rm: rm.patch_sweep(*PAIR).select(layer=True),
    "NaN for margin": lambda rm: losses.bradley_terry(torch.ones(2), torch.ones(2), margin=NAN),
    "a text for center": lambda rm: losses.bradley_terry(torch.ones(2), torch.ones(2), center="0.1"),
    "a bool for lam": lambda rm: values.gae(torch.ones(2), torch.ones(2), torch.tensor([0, 2]), lam=True),
    "a bool among indices of neurons": lambda rm: rmfast.NeuronClamp({"x": ([1, True], [0.0, 1.0])}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_cut_or_read_as_something_else_is_refused(rm, case):
    argument = case.removesuffix(" of score").removesuffix(" in select").removesuffix(" of neurons").split()[-1]
    with pytest.raises((TypeError, ValueError), match=argument):
        REFUSED[case](rm)
