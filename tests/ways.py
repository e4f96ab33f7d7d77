"""Devices, instruction sets and backends that the tests run on."""

from __future__ import annotations

import pytest
import torch

from rmfast.backends import NAMES, why_not

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ISAS = ["avx512", "avx2", "portable"]


def backends_of(op: str) -> list:
    """(device, backend, ISA) of every way to run `op` here; the others are listed as skips with their cause."""
    params = []
    for device in DEVICES:
        for name in NAMES:
            if name == "varlen":
                continue  # of one op, which tests it in files of its own
            if (name == "cpp") != (device == "cpu") and name not in ("eager", "triton"):
                continue
            cause = why_not(op, name, device)
            if name == "triton" and device == "cpu":
                continue  # the interpreter has a test file of its own, in a process of its own
            for isa in ISAS if name == "cpp" else [None]:
                marks = [] if cause is None else [pytest.mark.skip(reason=f"{device}, {name}: {cause}")]
                if device == "cuda":
                    marks.append(pytest.mark.gpu)
                label = "-".join(filter(None, (device, name, isa)))
                params.append(pytest.param((device, name, isa), id=label, marks=marks))
    return params
