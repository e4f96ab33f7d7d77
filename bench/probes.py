"""Rows of `rmfast.probes`: the whole suite as one packed run, against a run for each probe.

An input is the suite's texts by probe, of responses of three to six sentences to short prompts: first the responses,
then each probe's edited texts and controls. Texts are ids by word, so that no tokenizer is timed. Baselines:
- a run a probe: our engine, the responses once and each probe's texts by themselves;
- padded: the same through the model's own layers, in padded batches sorted by length.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import scoring
from bench.registry import Benchmark, Shape
from rmfast.probes import PROBES
from rmfast.probes.variants import responses_of, variants_of
from rmfast.texts.pairs import read_pairs

_WORDS = ["film", "story", "music", "scene", "actor", "plot", "place", "light", "voice", "end", "part", "idea"]
_PIECE = re.compile(r"\w+|[^\w\s]|\n")


def _ids(item: tuple[str, str]) -> np.ndarray:
    pieces = [*_PIECE.findall(item[0]), "</prompt>", *_PIECE.findall(item[1])]
    span = scoring.LAST - scoring.FIRST
    return np.array([scoring.FIRST + zlib.crc32(piece.encode()) % span for piece in pieces])


def groups(shape: Shape) -> list[scoring.Texts]:
    """The responses, and then each probe's edited texts and controls in turn."""
    rng = np.random.default_rng(0)

    def response() -> str:
        picked = rng.choice(_WORDS, (int(rng.integers(3, 7)), 3))
        return " ".join(f"The {a} of this {b} is what I think about when I hear of the {c}." for a, b, c in picked)

    pairs = [(f"What did you think of film {i}, and why?", response(), response()) for i in range(shape["pairs"])]
    responses = responses_of(read_pairs(pairs))
    found = [[_ids(each.input) for each in responses]]
    for probe in PROBES:
        variants = variants_of(probe, responses, len(responses), 0, lambda text: len(_PIECE.findall(text)))
        found.append([_ids(text) for variant in variants for text in (variant.edited, variant.control)])
    return found


class Suite(scoring.Scoring):
    """A model, and the suite's texts."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        self.groups = groups(shape)
        super().__init__({**shape, "workload": "equal", "texts": 1, "tokens": 4}, device, rotate)
        self.of([text for group in self.groups for text in group])


def ours(p: Suite) -> Callable[[scoring.Texts], Tensor]:
    return p.rm.score


def a_run_a_probe(p: Suite, **options: Any) -> Callable[[scoring.Texts], Tensor]:
    return lambda _: torch.cat([p.rm.score(group, **options) for group in p.groups])


def padded(p: Suite) -> Callable[[scoring.Texts], Tensor]:
    return a_run_a_probe(p, engine="padded")


BENCHMARKS = [
    Benchmark(
        f"probes/suite-{short}",
        {"model": "SmolLM2-135M", "dtype": dtype, "pairs": 2},
        {"model": scoring.TINY, "dtype": dtype, "pairs": 3},
        Suite,
        ours,
        {"a run a probe": {"": a_run_a_probe}, "padded": {"": padded}},
        limit={"cpu": "gemm", "cuda": "gemm"},
        targets={"cpu": {"a run a probe": 3}},
        rounds=(2, 10),
    )
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
]
