"""The resumable run over files that `score`, `values` and `steps` share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

import rmfast
from rmfast.cli.options import Options, chosen_backend, encoding_of, files_of_options, in_options, load_model
from rmfast.cli.progress import Progress
from rmfast.cli.rows import Layout, RowLayout
from rmfast.cli.shards import Shard
from rmfast.cli.termination import Terminated, Termination
from rmfast.texts.columns import BadRow
from rmfast.texts.files import LOCK, STANDARD, Source
from rmfast.texts.output import Lines, check_output, opened
from rmfast.texts.remote import Location
from rmfast.texts.tables import SUFFIXES, Row, count_and_digest, dump_line, kind_of, read_rows

Score = Callable[[list[Any]], Any]  # encoded inputs to a reward, or token rewards, for each


class Run:
    """One run of `score` or `values`: windows of rows in, lines out, in the input's order. `steps` has its own."""

    output: Lines

    def __init__(
        self, command: str, options: Options, column: str, tokens: bool = False,
        interventions: list[Path] | None = None, layout: Callable[..., RowLayout] = Layout, **run: Any,
    ) -> None:  # fmt: skip
        """layout: makes what says what rows hold; `run`: what else an output is of."""
        self.options, self.column, self.interventions = options, column, interventions or []
        self.kind = options.input_format or kind_of(options.input)
        self.shard = Shard.of(options.shard)
        self.path: Location = options.output if self.shard is None else self.shard.path(options.output)
        check_output(self.path)
        self.source = Source.of(options.input)
        self.count, digest = count_and_digest(self.source, self.kind)
        if self.shard is not None and self.count is not None:
            self.count = self.shard.size(self.count, options.window)
        self.base = _base_folder(Path(options.model))
        self.encoding = encoding_of(options)
        fixed = ("columns", "pooling", "num_labels", "head", "token_head", "dtype", "compute", "revision", "gguf_file")
        names = [field.name for field in dataclasses.fields(options) if field.name.endswith("_column")]
        self.run = {
            "rmfast": rmfast.__version__,
            "command": command,
            **dict(zip(("model", "model_files"), self.digest_of_model(options.model))),
            **dict(zip(("base", "base_files"), [None] * 2 if self.base is None else self.digest_of_model(self.base))),
            "interventions": [_content_digest(folder) for folder in self.interventions] or None,
            "input_sha256": digest,
            "tokens": tokens,
            "invariant": options.invariant or None,
            **({} if self.shard is None else {"shard": {**dataclasses.asdict(self.shard), "window": options.window}}),
            **self.encoding,
            **{name: getattr(options, name) for name in [*fixed, *names]},
            **run,
        }
        self.bad = self.texts = self.n_tokens = self.cut = 0
        self.layout = layout(options, self.source, self.kind, column, tokens)

    def load(self) -> Any:
        """The model."""
        return load_model(self.options)

    def revisions(self, model: Any) -> dict[str, str | None]:
        """The commits on the hub of which the model is: they may have moved since an earlier run."""
        base = getattr(model.model.config, "_commit_hash", None)  # an adapter's base's
        return {"model_revision": base, "adapter_revision": _adapter_revision(self.options)}

    def digest_of_model(self, model: str | Path) -> list[str | None]:
        """What a model is: its folder and a digest of its files, or its id on the hub.

        Of a shard, whose others may be on machines with a copy of the folder, a digest of their bytes alone.
        """
        local = Path(model)
        if not local.exists():
            return [str(model), None]
        if self.shard is not None:
            return [None, _bytes_digest(local)]
        return [str(local.resolve()), _files_digest(local)]

    def encode(self, model: Any, inputs: list[Any]) -> list[Any]:
        """The inputs as token ids; errors in the place of those that can't be scored."""
        return model.encode(inputs, errors="return", **self.encoding)

    def arguments(self, model: Any) -> dict[str, Any]:
        """What the model's method is given that goes by the model."""
        return {}

    def go(self, method: str, **settings: Any) -> None:
        """Score all rows that are not done, by a method of the model's, which is given `settings`."""
        o = self.options
        self.run |= settings
        try:
            with (
                Termination() as self.termination,
                opened(self.path, self.run, reads=self._reads(), overwrite=o.overwrite) as self.output,
            ):
                if self.shard is not None:
                    typer.echo(f"rmfast: shard {self.shard.index}/{self.shard.count}: {self.path}", err=True)
                if self.output.finished:
                    return typer.echo(f"rmfast: {self.path} is complete; --overwrite starts anew", err=True)
                self._go(method, settings)
        except (KeyboardInterrupt, Terminated) as error:
            if self.path != STANDARD:
                error.args = ("(the same command goes on where it stopped)",)
            raise

    def _go(self, method: str, settings: dict[str, Any]) -> None:
        model = self.load()
        if self.interventions:
            from rmfast.interventions import load

            model = model.with_interventions(*map(load, self.interventions))
        self.output.begin(**self.revisions(model))
        o = self.options
        function = functools.partial(
            getattr(model, method),
            batch_tokens=o.batch_tokens,
            max_length=o.max_length,
            engine=o.engine,
            **settings,
            **self.arguments(model),
        )
        first, start = self.output.next_row, time.perf_counter()
        backend = chosen_backend(o)
        with backend, Progress(self.count, first) as progress:
            for number, rows in self._windows(first):
                with self.termination.finishing():
                    stopped = self._window(model, number, rows, function)
                    progress.reached(self.output.next_row, self._rates(time.perf_counter() - start))
                if stopped:
                    raise stopped
        self.output.finish()
        seconds = time.perf_counter() - start
        typer.echo(
            f"rmfast: {self.output.next_row - first} rows, {self.texts} texts, {self.n_tokens} tokens"
            f" in {seconds:.1f} s: {self._rates(seconds)}"
            + "".join(f"; {n} {what}" for n, what in ((self.cut, "texts cut"), (self.bad, "bad rows")) if n),
            err=True,
        )

    def _reads(self) -> Iterator[Location]:
        """The files that this run must not write."""
        yield Path("/dev/stdin") if self.options.input == STANDARD else self.options.input
        yield from files_of_options(self.options.tools, self.options.chat_template_kwargs)
        for folder in (Path(self.options.model), *([self.base] if self.base else []), *self.interventions):
            yield from model_files(folder)

    def _rates(self, seconds: float) -> str:
        return f"{self.texts / seconds:.1f} texts/s, {self.n_tokens / seconds:.0f} tokens/s"

    def _windows(self, first: int) -> Iterator[tuple[int, list[Row]]]:
        """Windows (number of their first row, rows) from row `first` on; a shard counts its own rows.

        They are cut at multiples of --window of the whole file, so that a resumed run batches as if never interrupted.
        """
        number, size = first, self.options.window
        every = read_rows(self.source, self.kind)
        rows = itertools.islice(every if self.shard is None else self.shard.part(every, size), first, None)
        while window := list(itertools.islice(rows, size - number % size)):
            yield number, window
            number += len(window)

    def _window(self, model: Any, number: int, rows: list[Row], function: Score) -> BadRow | None:
        """Score one window and write its lines. Returns the error that ends the run, where a bad row does."""
        o, errors = self.options, dict[int, str]()  # place in the window: reason
        inputs: list[tuple[int, Any]] = []  # (place, input)
        for place, row in enumerate(rows):
            try:
                inputs += [(place, item) for item in self.layout.inputs(row)]
            except BadRow as error:
                errors[place] = str(error)
        given = [item for _, item in inputs]
        encoded = self.encode(model, given)
        results: dict[int, list[tuple[Any, Any]]] = {}  # place: (encoded input, reward) of its texts
        for place, item, result in self._results([place for place, _ in inputs], encoded, errors, function):
            if not _finite(result):
                errors.setdefault(place, f"its {self.column} is not finite")
            results.setdefault(place, []).append((item, result))

        end = self._end(errors, len(rows))
        lines, skipped = [], []
        for place, row in enumerate(rows[:end]):
            if place not in errors:
                lines.append(dump_line(row.data | self.layout.cells(model, row, results[place])))
                continue
            self.bad += 1
            reason = in_options(errors[place], vars(o))
            self._report(row.line, reason)
            if o.on_error == "null":
                lines.append(dump_line(row.data | dict.fromkeys(self.layout.new_columns()) | {"error": reason}))
            else:
                skipped.append((number + place, Row(row.line, {}, reason)))
        self.output.append(lines, skipped)
        if end < len(rows):
            hint = "--on-error skip or null goes on past bad rows"
            return BadRow(f"{self.source.name}, line {rows[end].line}: {errors[end]} ({hint})")
        return None

    def _end(self, errors: dict[int, str], size: int) -> int:
        """Where in its window the run ends: at the first bad row, with --on-error stop."""
        return min(errors, default=size) if self.options.on_error == "stop" else size

    def _results(
        self, places: list[int], encoded: list[Any], errors: dict[int, str], function: Score
    ) -> list[tuple[int, Any, Any]]:
        """(place, encoded input, reward) of each text that has one; `errors` gains the texts that the model refuses."""
        for place, item in zip(places, encoded, strict=True):
            if isinstance(item, Exception):
                errors.setdefault(place, getattr(item, "reason", str(item)))
        while True:
            end = self._end(errors, max(places, default=0) + 1)
            good = [(place, item) for place, item in zip(places, encoded) if place not in errors and place < end]
            try:
                results = function([item for _, item in good]) if good else []
            except ValueError as error:
                # An InputError that `encode` can't foresee: a text without the token that --pooling names.
                if not hasattr(error, "index"):
                    raise
                errors[good[error.index][0]] = getattr(error, "reason", str(error))
                continue
            self.texts += len(good)
            self.n_tokens += sum(len(item) for _, item in good)
            self.cut += sum(item.cut > 0 for _, item in good)
            return [(place, item, _plain(result)) for (place, item), result in zip(good, results, strict=True)]

    def _report(self, line: int, reason: str) -> None:
        from tqdm import tqdm

        tqdm.write(f"{self.source.name}, line {line}: {reason}", file=sys.stderr)


def model_files(path: Path) -> list[Path]:
    """The files of a local model or intervention; none of one on the hub.

    Tables are none of the model's: they are what somebody keeps there, as the output of this or another run.
    """
    if not path.is_dir():
        return [path] if path.exists() else []
    others = (*SUFFIXES, *(suffix + ".gz" for suffix in SUFFIXES), LOCK)
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.lower().endswith(others))


def _base_folder(folder: Path) -> Path | None:
    """The folder of the model that an adapter is put on; None for other models and bases on the hub."""
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        base = Path(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):  # loading says what is wrong with it
        return None
    return base if base.exists() else None


def _adapter_revision(options: Options) -> str | None:
    """The commit of an adapter on the hub, which may have moved since an earlier run."""
    if Path(options.model).exists():
        return None
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    missing = dict.fromkeys(
        (f"_raise_exceptions_for_{what}" for what in ("missing_entries", "connection_errors")), False
    )
    file = cached_file(options.model, "adapter_config.json", revision=options.revision, **missing)
    return extract_commit_hash(file, None)


def _files_digest(folder: Path) -> str:
    """Of the names, sizes and times of a model's files: reading 16 GB of weights at every start would take 16 s."""
    seen = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model_files(folder)]
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def _bytes_digest(folder: Path) -> str:
    """Of all that a model's files hold: some 10 s for 16 GB, which a shard reads once."""
    digest = hashlib.sha256()
    for path in model_files(folder):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _content_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("intervention.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _plain(result: Any) -> Any:
    """A 0-, 1- or 2-d array of rewards as floats that are short in JSON: the fewest digits that give the same fp32."""
    import numpy as np

    array = np.asarray(result)
    short = np.vectorize(lambda x: float(str(x)), otypes=[object])(array)
    return short.tolist() if array.ndim else short.item()


def _finite(value: Any) -> bool:
    return all(map(_finite, value)) if isinstance(value, list) else math.isfinite(value)
