"""In which precision transformers computes the truth."""

from __future__ import annotations

import contextlib

import oracle as O
import pytest
import torch


@pytest.fixture
def all_fp64():
    with O.everything_in_fp64():
        yield


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request):
    with O.everything_in_fp64() if request.param == torch.float64 else contextlib.nullcontext():
        yield request.param
