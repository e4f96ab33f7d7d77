"""Activations of one site, collected in packed runs of texts and read back in shuffled batches, also from a file."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from rmfast.arguments import instance, whole, word
from rmfast.arguments import path as path_of
from rmfast.engine.options import checked_run
from rmfast.engine.scorer import Scorer
from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.sites import STREAM_KINDS
from rmfast.patching.watched import SiteRows, run_watched
from rmfast.texts.inputs import Encoded

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FACTS, _ROWS = "activations.json", "activations.bin"

# Rows that lie together in a file are read together; so many bytes of such blocks are shuffled row by row in memory.
_BLOCK = 256
_SHUFFLED_BYTES = 1 << 29

_NONE_KEPT = "Expected inputs of at least one token to keep beyond skip, got none"

# Tokens that are run and written at once.
_WINDOW_TOKENS = 1 << 16


@dataclass(eq=False, repr=False, kw_only=True)
class Activations:
    """Rows of one site, those of a folder memory-mapped: `Activations.open` of what `collect` has written.

    Attributes:
        rows: (N, d), float32, bfloat16 or float16.
        hook_name: where they are from, in TransformerLens' names ("blocks.3.hook_resid_post"), or None.
        positions: "all" tokens or the "last" of each text, the one that is read; None where that is not known.
    """

    rows: Tensor
    hook_name: str | None = None
    positions: str | None = None

    def __post_init__(self) -> None:
        rows = instance("rows", self.rows, Tensor)
        if rows.dim() != 2 or rows.dtype not in _DTYPES.values() or 0 in rows.shape or rows.is_meta:
            raise ValueError(
                f"Expected activations to be rows (N, d) of {', '.join(_DTYPES)}, got {tuple(rows.shape)} of "
                f"{str(rows.dtype)[6:]}"
            )
        if self.hook_name is not None:
            instance("hook_name", self.hook_name, str)
        if self.positions is not None:
            word("positions", self.positions, ("all", "last"))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        n, d = self.rows.shape
        where = "" if self.hook_name is None else f" of {self.hook_name}"
        return f"Activations({n} rows of {d}, {str(self.rows.dtype)[6:]}{where}, positions={self.positions!r})"

    @classmethod
    def open(cls, folder: Any) -> Activations:
        """Memory-maps what `collect` has written to a folder.

        Raises:
            FileNotFoundError: the folder holds none.
            ValueError: its files do not fit each other.
        """
        folder = path_of("folder", folder)
        facts, rows = folder / _FACTS, folder / _ROWS
        for path in (facts, rows):
            if not path.is_file():
                raise FileNotFoundError(f"{folder} holds no activations: it has no {path.name}")
        told = json.loads(facts.read_text())
        n, d, dtype = told["rows"], told["width"], _DTYPES[word("dtype", told["dtype"], _DTYPES)]
        if rows.stat().st_size != n * d * dtype.itemsize:
            raise ValueError(f"Expected {rows} to hold {n} rows of {d} in {told['dtype']}, got {rows.stat().st_size} B")
        mapped = torch.from_file(str(rows), shared=False, size=n * d, dtype=dtype)
        return cls(rows=mapped.view(n, d), hook_name=told["hook_name"], positions=told["positions"])

    def split(self, held_out: int) -> tuple[Activations, Activations]:
        """All but the last rows, and the last `held_out` ones; rows stand in the order of the texts."""
        cut = len(self) - whole("held_out", held_out, 1, len(self) - 1)
        facts = {"hook_name": self.hook_name, "positions": self.positions}
        return Activations(rows=self.rows[:cut], **facts), Activations(rows=self.rows[cut:], **facts)

    def sample(self, most: int) -> Tensor:
        """(n, d) fp32, at most `most` rows at equal distances."""
        at = torch.linspace(0, len(self) - 1, min(len(self), whole("most", most, 1)), dtype=torch.float64)
        return self.rows[at.round().long()].float()

    @property
    def fingerprint(self) -> str:
        """Of the shape, the dtype and a sample of the rows."""
        digest = hashlib.sha256(f"{tuple(self.rows.shape)} {self.rows.dtype}".encode())
        digest.update(self.sample(64).cpu().numpy().tobytes())
        return digest.hexdigest()

    def batches(self, size: int, *, seed: int = 0, start: int = 0) -> Iterator[Tensor]:
        """Batches (size, d), epoch after epoch without end, in an order that goes by the seed and the size alone.

        Blocks of 256 rows are drawn in a random order, and the rows of half a GiB of blocks shuffled in memory: a file
        is read in long stretches. What is left of them over whole batches waits for another epoch.

        Args:
            start: how many batches to leave out, which are not read.

        Raises:
            ValueError: there are fewer rows than a batch.
        """
        size, start = whole("size", size, 1), whole("start", start, 0)
        whole("seed", seed, 0)
        if len(self) < size:
            raise ValueError(
                f"Expected size, of a batch, to be at most the {len(self)} rows of activations, got {size}"
            )
        return self._batches(size, seed, start)

    def _batches(self, size: int, seed: int, skip: int) -> Iterator[Tensor]:
        n, row_bytes = len(self), self.rows.size(1) * self.rows.itemsize
        blocks_at_once = max(_SHUFFLED_BYTES // row_bytes, 4 * size) // _BLOCK + 1
        for epoch in itertools.count():
            draw = np.random.default_rng([seed, epoch])
            blocks = draw.permutation(-(-n // _BLOCK))
            for i in range(0, len(blocks), blocks_at_once):
                spans = [(b * _BLOCK, min(n, (b + 1) * _BLOCK)) for b in blocks[i : i + blocks_at_once].tolist()]
                count = sum(end - first for first, end in spans)
                order = torch.from_numpy(draw.permutation(count))
                if skip >= count // size:
                    skip -= count // size
                    continue
                rows = torch.cat([self.rows[first:end] for first, end in spans])
                for j in range(skip * size, count // size * size, size):
                    yield rows[order[j : j + size]]
                skip = 0


def collect(
    rm: Scorer,
    inputs: Sequence[Any],
    folder: Any = None,
    *,
    layer: int,
    site: str = "resid_post",
    positions: Literal["all", "last"] = "all",
    skip: int = 0,
    dtype: str | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
    **encoding: Any,
) -> Activations:
    """Runs texts and keeps what comes by at one site, at all tokens or at those where the rewards are read.

    Texts run as for `RewardModel.score`: packed, shared prompts once, where the model and the site let them. A shared
    prompt's rows are there once for each text all the same.

    Args:
        rm: the model.
        inputs: as for `score`; some at a time are run and written.
        folder: where the rows go, to be memory-mapped (`Activations.open`); None keeps them in memory.
        layer: from 0.
        site: resid_pre, resid_mid, resid_post, attn_out or mlp_out (`rmfast.patching.sites`).
        positions: "all" tokens, or the "last" one, at which the reward is read.
        skip: how many tokens at the beginning of each text to leave out, with "all": the first one's norm is often a
            hundred times that of others.
        dtype: "float32", "bfloat16" or "float16"; default that of what the model's own modules give, fp32 for fp64.
        batch_tokens, progress, encoding: as for `score`.

    Raises:
        ValueError: a layer or site that the model lacks; a head that pools; no row at all.
    """
    instance("rm", rm, Scorer).expect_clamps_alone(("all",))
    batch_tokens = checked_run(batch_tokens, progress)
    word("site", site, STREAM_KINDS)
    word("positions", positions, ("all", "last"))
    skip = whole("skip", skip, 0)
    if skip and positions == "last":
        raise ValueError(f'Expected skip with positions "all" alone, got {skip}')
    if rm.pools:
        raise ValueError("Expected a model whose reward is read at a token, got one that pools")
    if dtype is None:
        own = str(rm.binding.stream_dtype)[6:]
        dtype = own if own in _DTYPES else "float32"
    stored = _DTYPES[word("dtype", dtype, _DTYPES)]
    patcher = LayersPatcher(rm.binding)
    seen = SiteRows(patcher, layer, site)

    def read(hidden: Tensor, at: Tensor) -> Tensor:
        return seen.rows(hidden.reshape(-1, hidden.size(-1))[at])

    def run(texts: list[Encoded]) -> Tensor:
        where = rm.reads(texts) if positions == "last" else [np.arange(len(text)) for text in texts]
        found = run_watched(rm, patcher.binding, seen.taps, texts, where, read, batch_tokens, packed=seen.packed)
        # Not in the run: in one that is computed in fp32 nothing is made of 16 bits.
        return torch.cat([values[skip:] for values, _ in found]).to(stored)

    facts = {"hook_name": f"blocks.{layer}.hook_{site}", "positions": positions}
    windows = (run(texts) for texts in _windows(rm.encode(inputs, **encoding), progress))
    if folder is None:
        rows = torch.cat([*windows] or [torch.empty(0, 0)])
        if not len(rows):
            raise ValueError(_NONE_KEPT)
        return Activations(rows=rows, **facts)
    folder = path_of("folder", folder)
    _write(folder, windows, dtype, facts)
    return Activations.open(folder)


def _windows(texts: list[Encoded], progress: bool) -> Iterator[list[Encoded]]:
    """As many texts at a time as have some tokens."""
    first, tokens = 0, 0
    with tqdm(total=len(texts), unit="text", disable=not progress) as bar:
        for end, text in enumerate(texts, 1):
            tokens += len(text)
            if tokens >= _WINDOW_TOKENS or end == len(texts):
                yield texts[first:end]
                bar.update(end - first)
                first, tokens = end, 0


def _write(folder: Path, windows: Iterable[Tensor], dtype: str, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FACTS).unlink(missing_ok=True)  # until all rows are there
    partial, n, d = folder / f"{_ROWS}.partial", 0, 0
    with partial.open("wb") as file:
        for rows in windows:
            file.write(rows.contiguous().view(torch.uint8).numpy().tobytes())
            n, d = n + len(rows), rows.size(1)
    if n == 0:
        partial.unlink()
        raise ValueError(_NONE_KEPT)
    os.replace(partial, folder / _ROWS)
    (folder / _FACTS).write_text(json.dumps({"rows": n, "width": d, "dtype": dtype, **facts}))
