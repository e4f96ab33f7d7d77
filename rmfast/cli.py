"""The `rmfast` command: score files of texts in bounded memory, resume, sweep, explain.

Nothing here imports torch or transformers until a model is needed, so `rmfast --help` stays quick. Annotations are
read by typer at run time: no `from __future__ import annotations`.
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

import rmfast
from rmfast.pairs import join
from rmfast.tables import Output, Row, count_and_digest, dump_line, kind_of, read_rows

app = typer.Typer(
    help="Fast, exact reward-model scoring.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Columns = Literal["pairs", "response", "messages", "text"]
Score = Callable[[list[Any]], Any]  # encoded inputs to a reward, or token rewards, for each


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What all commands that run a model share; one command-line option each."""

    model: Annotated[str, typer.Option(help="A model's folder or hub id.")]
    format: Annotated[
        Literal["chat", "pair", "concat"] | None,
        typer.Option(help="How a prompt and a response become one text; default: as the model's tokenizer suggests."),
    ] = None
    truncation: Annotated[
        Literal["error", "left", "right"], typer.Option(help="A text over the limit is an error, or cut on this side.")
    ] = "error"
    max_length: Annotated[int | None, typer.Option(min=1, help="Most tokens of a text; default: the model's.")] = None
    pooling: Annotated[str, typer.Option(help='The token that is read: "auto", "last" or a token id.')] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None, typer.Option(help="Default: as it is saved.")
    ] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")] = None
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens that run at once.")] = None
    backend: Annotated[
        Literal["cuda", "triton", "cpp", "eager"] | None, typer.Option(help="Default: see `rmfast explain`.")
    ] = None
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub.")] = None
    gguf_file: Annotated[str | None, typer.Option(help="The GGUF file in the model's folder.")] = None
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error arose.")] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """What `score` and `values` share besides."""

    input: Annotated[Path, typer.Option(help="A .jsonl, .csv or .parquet file.", exists=True, dir_okay=False)]
    output: Annotated[Path, typer.Option(help="The JSONL file to write, or to go on with.", dir_okay=False)]
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the output exists.")] = False
    on_error: Annotated[
        Literal["stop", "skip", "null"], typer.Option(help="At a bad row: stop, leave it out, or write it with null.")
    ] = "stop"
    columns: Annotated[Columns | None, typer.Option(help="What the rows hold; default: by their column names.")] = None
    prompt_column: Annotated[str, typer.Option()] = "prompt"
    response_column: Annotated[str, typer.Option()] = "response"
    chosen_column: Annotated[str, typer.Option()] = "chosen"
    rejected_column: Annotated[str, typer.Option()] = "rejected"
    messages_column: Annotated[str, typer.Option()] = "messages"
    text_column: Annotated[str, typer.Option()] = "text"
    output_column: Annotated[str | None, typer.Option(help="The new column; default: reward, or values.")] = None
    input_format: Annotated[
        Literal["jsonl", "csv", "parquet"] | None, typer.Option(help="Default: by the file's suffix.")
    ] = None
    window: Annotated[int, typer.Option(min=1, help="Rows read, scored by length and written at a time.")] = 512
    engine: Annotated[
        Literal["packed", "padded"] | None, typer.Option(help="Default: packed where the model can run so.")
    ] = None


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(options, **own)` one parameter for every field of its options' class, and one-line errors.

    Typer reads a function's signature; writing these 28 parameters out in each command is the alternative.
    """
    first, *own = inspect.signature(command).parameters.values()
    kind = first.annotation
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=field.type,
        )
        for field in dataclasses.fields(kind)
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = kind(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: typer.echo(f"rmfast: {message}", err=True)  # one line
                command(options, **given)
        except KeyboardInterrupt:
            _fail("interrupted; the same command goes on where it stopped", code=130)
        except Exception as error:
            if options.traceback:
                raise
            _fail(" ".join(str(error).split()) or type(error).__name__)

    parameters = sorted([*own, *shared], key=lambda p: p.default is not inspect.Parameter.empty)  # needed ones first
    run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"rmfast: {message}", err=True)
    raise typer.Exit(code)


@app.command()
@_with_options
def score(
    options: Options,
    stats: Annotated[bool, typer.Option("--stats", help="Print mean, spread and, of pairs, the accuracy.")] = False,
    intervention: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder with an intervention, as `debias` writes; several add up.", exists=True, file_okay=False
        ),
    ] = None,
) -> None:
    """Write every input row with the reward of its text (of both texts, for chosen/rejected pairs)."""
    run = Run("score", options, options.output_column or "reward", interventions=intervention or [])
    run.go("score")
    if stats:
        typer.echo(_statistics(options.output, run.column))


@app.command()
@_with_options
def values(
    options: Options,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also write the tokens and their ids.")] = False,
) -> None:
    """Write every input row with the reward at every token of its text."""
    run = Run("values", options, options.output_column or "values", tokens=tokens)
    run.go("token_values")


@app.command()
@_with_options
def sweep(
    options: ModelOptions,
    clean: Annotated[str, typer.Option(help="A text, or @FILE that holds it.")],
    output: Annotated[Path, typer.Option(help="The folder to write.", file_okay=False)],
    corrupted: Annotated[str | None, typer.Option(help="The text it is compared with, or @FILE that holds it.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What both texts respond to, or @FILE that holds it.")] = None,
    mode: Annotated[
        Literal["denoising", "noising", "zero", "mean", "resample"],
        typer.Option(help="What is put in: clean activations into the corrupted run, the reverse; or into the clean."),
    ] = "denoising",
    sites: Annotated[str, typer.Option(help="One kind or several, like attn_out,mlp_out.")] = "resid_post",
    layers: Annotated[str | None, typer.Option(help="Like 0,4-7; default: all.")] = None,
    positions: Annotated[
        str, typer.Option(help='"all", "joint" or a list like 3,5,7-9, where a span is patched as one.')
    ] = "all",
    heads: Annotated[str | None, typer.Option(help="Like 0,4-7; default: all.")] = None,
    neurons: Annotated[str | None, typer.Option(help="Those of mlp_neuron, like 0,4-7.")] = None,
    align: Annotated[Literal["auto", "strict"], typer.Option(help="strict: refuse texts of unequal length.")] = "auto",
    baseline: Annotated[
        Path | None, typer.Option(help="Texts of mean and resample: .jsonl, .csv or .parquet.", dir_okay=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of resample.")] = 0,
    screen: Annotated[int | None, typer.Option(min=1, help="Run the N sites that attribution ranks first.")] = None,
    top: Annotated[int, typer.Option(min=0, help="The strongest sites to print.")] = 10,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Where finished rewards are kept; default: in the output folder, till the end.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the output exists.")] = False,
) -> None:
    """Patch every site of a run and write the rewards: the result, a CSV and a heat map (see docs/sweep.md)."""
    if (output / "sweep.json").exists() and not overwrite:
        raise ValueError(f"Expected --output to hold no sweep, got {output}; --overwrite starts anew")
    ask = None if prompt is None else _text(prompt)
    texts = [join(ask, _text(given)) for given in (clean, corrupted) if given is not None]
    chosen = {
        "mode": mode,
        "sites": sites.split(",") if "," in sites else sites,
        "layers": _flat("--layers", layers),
        "positions": positions if positions in ("all", "joint") else _listed("--positions", positions),
        "heads": _flat("--heads", heads),
        "neurons": _flat("--neurons", neurons),
        "baseline": None if baseline is None else [_baseline(row, baseline) for row in read_rows(baseline)],
        "screen": None if screen is None else "atp",
        "top": screen,
        **{name: getattr(options, name) for name in ("batch_tokens", "max_length", "truncation", "format")},
    }
    kept = checkpoint or output / "checkpoint.safetensors"
    if overwrite:
        kept.unlink(missing_ok=True)
    with rmfast.backend(options.backend) if options.backend else contextlib.nullcontext():
        model = _load(options)
        progress = sys.stderr.isatty()
        result = model.patch_sweep(*texts, **chosen, align=align, seed=seed, checkpoint=kept, progress=progress)
    _write_sweep(result, output)
    if checkpoint is None:
        kept.unlink(missing_ok=True)
    typer.echo(_described(result, top))


@app.command()
@_with_options
def debias(
    options: ModelOptions,
    pairs: Annotated[
        Path,
        typer.Option(help="Columns prompt, chosen, rejected: .jsonl, .csv or .parquet.", exists=True, dir_okay=False),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.", file_okay=False)],
    test: Annotated[
        Path | None,
        typer.Option(help="Pairs to report on; default: those it is fitted on.", exists=True, dir_okay=False),
    ] = None,
    attributes: Annotated[str | None, typer.Option(help="Like length,overlap; default: all five.")] = None,
    k: Annotated[
        str, typer.Option(help='"search", a number, or one for each, like length=500,overlap=100.')
    ] = "search",
    trials: Annotated[int, typer.Option(min=1, help="Of the search.")] = 100,
    positions: Annotated[
        Literal["last", "all"], typer.Option(help="The tokens at which neurons are clamped.")
    ] = "last",
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the output exists.")] = False,
) -> None:
    """Find the neurons that carry biases and clamp them: writes the intervention and reports (see docs/debias.md)."""
    if (output / "intervention.json").exists() and not overwrite:
        raise ValueError(f"Expected --output to hold no intervention, got {output}; --overwrite starts anew")
    fitted = [_preference(row, pairs) for row in read_rows(pairs)]
    tested = fitted if test is None else [_preference(row, test) for row in read_rows(test)]
    names = None if attributes is None else [name.strip() for name in attributes.split(",")]
    ks = _numbers("--k", k)
    encoding: dict[str, Any] = {name: getattr(options, name) for name in ("max_length", "truncation", "format")}
    from rmfast import debias as method

    with rmfast.backend(options.backend) if options.backend else contextlib.nullcontext():
        model = _load(options)
        progress = sys.stderr.isatty()
        clamp = method.fit(
            model, fitted, attributes=names, k=ks, trials=trials, positions=positions, seed=seed, progress=progress,
            batch_tokens=options.batch_tokens, **encoding,
        )  # fmt: skip
        reports = {
            name: method.report(rm, tested, attributes=names, batch_tokens=options.batch_tokens, **encoding)
            for name, rm in (("before", model), ("after", model.with_interventions(clamp)))
        }
    clamp.save(output)
    _write_rows(output / "report.csv", [(name, *row) for name, report in reports.items() for row in report.rows],
                ("model", *reports["before"].rows[0]._fields))  # fmt: skip
    _draw(lambda: method.plot(reports), output / "report.png")
    chosen = "  ".join(f"{name} {each}" for name, each in clamp.metadata["k"].items())
    typer.echo(f"{len(clamp)} neurons clamped, k: {chosen}")
    typer.echo("reports on the pairs it was fitted on, which flatter it" if test is None else f"reports on {test.name}")
    for name, report in reports.items():
        typer.echo(f"\n{name}: {report}")


@app.command()
def explain(
    op: Annotated[str | None, typer.Option(help="One op; default: all.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: those here.")] = None,
    model: Annotated[str | None, typer.Option(help="Also tell which engine scores this model, and why.")] = None,
) -> None:
    """Tell which backend would run for each op, and for each that would not, why, and what would fix it."""
    try:
        if model is None:
            typer.echo(str(rmfast.explain(op, device)))
        elif op is None:
            typer.echo(rmfast.load(model, device=device).explain())
        else:
            raise ValueError("Expected --op or --model, got both")
    except Exception as error:
        _fail(" ".join(str(error).split()))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"rmfast {rmfast.__version__}")
        raise typer.Exit


class BadRow(ValueError):
    """A row that can't be scored; the message says why."""


class Run:
    """One run of `score` or `values`: windows of rows in, lines out, in the input's order."""

    def __init__(
        self, command: str, options: Options, column: str, tokens: bool = False, interventions: list[Path] | None = None
    ) -> None:
        self.options, self.column, self.tokens, self.interventions = options, column, tokens, interventions or []
        self.kind = options.input_format or kind_of(options.input)
        self.count, digest = count_and_digest(options.input, self.kind)
        local = Path(options.model)
        fixed = ("columns", "format", "truncation", "max_length", "pooling", "dtype", "revision", "gguf_file")
        names = [field.name for field in dataclasses.fields(Options) if field.name.endswith("_column")]
        run = {
            "rmfast": rmfast.__version__,
            "command": command,
            "model": str(local.resolve()) if local.exists() else options.model,
            "model_files": _files_digest(local) if local.exists() else None,
            "interventions": [_content_digest(folder) for folder in self.interventions] or None,
            "input_sha256": digest,
            "tokens": tokens,
            **{name: getattr(options, name) for name in [*fixed, *names]},
        }
        if options.output.resolve() == options.input.resolve():
            raise ValueError("Expected --output to be another file than --input")
        self.mode: Columns | None = options.columns
        self.bad = self.texts = self.n_tokens = 0
        self._settle()
        options.output.parent.mkdir(parents=True, exist_ok=True)
        self.output = Output(options.output, run, overwrite=options.overwrite)

    def go(self, method: str) -> None:
        """Score all rows that are not done, by the model's `score` or `token_values`."""
        if self.output.finished:
            return typer.echo(f"rmfast: {self.output.path} is complete; --overwrite starts anew", err=True)
        model = _load(self.options)
        if self.interventions:
            from rmfast.interventions import load

            model = model.with_interventions(*map(load, self.interventions))
        self.output.begin(model_revision=getattr(model.model.config, "_commit_hash", None))

        from tqdm import tqdm

        o = self.options
        function = functools.partial(
            getattr(model, method), batch_tokens=o.batch_tokens, max_length=o.max_length, engine=o.engine
        )
        first, start = self.output.next_row, time.perf_counter()
        backend = rmfast.backend(self.options.backend) if self.options.backend else contextlib.nullcontext()
        bar = tqdm(total=self.count, initial=first, unit="row", disable=None)  # None: only on a terminal
        with backend, bar:
            for number, rows in self._windows(first):
                stopped = self._window(model, number, rows, function)
                bar.update(self.output.next_row - bar.n)
                bar.set_postfix_str(self._rates(time.perf_counter() - start))
                if stopped:
                    raise stopped
        self.output.finish()
        seconds = time.perf_counter() - start
        typer.echo(
            f"rmfast: {self.output.next_row - first} rows, {self.texts} texts, {self.n_tokens} tokens"
            f" in {seconds:.1f} s: {self._rates(seconds)}" + (f"; {self.bad} bad rows" if self.bad else ""),
            err=True,
        )

    def _rates(self, seconds: float) -> str:
        return f"{self.texts / seconds:.1f} texts/s, {self.n_tokens / seconds:.0f} tokens/s"

    def _windows(self, first: int) -> Iterator[tuple[int, list[Row]]]:
        """Windows (number of their first row, rows) from row `first` on.

        They are cut at multiples of --window of the whole file, so that a resumed run batches as if never interrupted.
        """
        rows = itertools.islice(read_rows(self.options.input, self.kind), first, None)
        number, size = first, self.options.window
        while window := list(itertools.islice(rows, size - number % size)):
            yield number, window
            number += len(window)

    def _settle(self) -> None:
        """Choose the mode by the columns of the first readable row, and see that the new columns are free."""
        data = next((row.data for row in read_rows(self.options.input, self.kind) if not row.error), None)
        if data is None:
            return
        if self.mode is None:
            self.mode = self._mode_of(data)
        if taken := self._taken(data):
            raise ValueError(
                f"Expected the new column {taken[0]!r} not to be in the input: give another --output-column"
            )

    def _taken(self, data: dict[str, Any]) -> list[str]:
        """The new columns that a row already has."""
        new = [*self._new_columns(), "error"] if self.options.on_error == "null" else self._new_columns()
        return sorted(set(data) & set(new))

    def _mode_of(self, data: dict[str, Any]) -> Columns:
        o = self.options
        wanted: dict[Columns, tuple[str, ...]] = {
            "pairs": (o.chosen_column, o.rejected_column),
            "messages": (o.messages_column,),
            "response": (o.prompt_column, o.response_column),
            "text": (o.text_column,),
        }
        for mode, names in wanted.items():
            if all(name in data for name in names):
                return mode
        expected = " or ".join("+".join(names) for names in wanted.values())
        raise ValueError(
            f"Expected columns {expected}, got {', '.join(data) or 'none'}; see --text-column and the like"
        )

    def _new_columns(self) -> list[str]:
        columns = [self.column + suffix for suffix in self._suffixes()]
        if self.tokens:
            columns += [name + suffix for name in ("tokens", "token_ids") for suffix in self._suffixes()]
        return columns

    def _suffixes(self) -> tuple[str, ...]:
        return ("_chosen", "_rejected") if self.mode == "pairs" else ("",)

    def _inputs(self, row: Row) -> list[Any]:
        """The row's texts, as the model takes them: one, or two for a pair. Raises BadRow."""
        if row.error:
            raise BadRow(row.error)
        if taken := self._taken(row.data):  # rows of JSONL may differ in their columns
            raise BadRow(f"has a column {taken[0]!r} of its own: give another --output-column")
        o = self.options
        if self.mode == "pairs":
            prompt = _cell(row, o.prompt_column) if row.data.get(o.prompt_column) is not None else None
            return [join(prompt, _cell(row, column)) for column in (o.chosen_column, o.rejected_column)]
        if self.mode == "response":
            return [join(_cell(row, o.prompt_column), _cell(row, o.response_column))]
        column = o.messages_column if self.mode == "messages" else o.text_column
        cell = _cell(row, column, parse=self.mode == "messages")
        if isinstance(cell, str) != (self.mode == "text"):
            raise BadRow(f"column {column!r} holds {'messages' if self.mode == 'text' else 'no list of messages'}")
        return [cell]

    def _window(self, model: Any, number: int, rows: list[Row], function: Score) -> BadRow | None:
        """Score one window and write its lines. Returns the error that ends the run, where a bad row does."""
        o, errors = self.options, dict[int, str]()  # place in the window: reason
        inputs: list[tuple[int, Any]] = []  # (place, input)
        for place, row in enumerate(rows):
            try:
                inputs += [(place, item) for item in self._inputs(row)]
            except BadRow as error:
                errors[place] = str(error)
        given = [item for _, item in inputs]
        encoded = model.encode(
            given, max_length=o.max_length, truncation=o.truncation, format=o.format, errors="return"
        )
        results: dict[int, list[tuple[Any, Any]]] = {}  # place: (encoded input, reward) of its texts
        for place, item, result in self._results([place for place, _ in inputs], encoded, errors, function):
            if not _finite(result):
                errors.setdefault(place, f"its {self.column} is not finite")
            results.setdefault(place, []).append((item, result))

        end = self._end(errors, len(rows))
        lines, skipped = [], []
        for place, row in enumerate(rows[:end]):
            if place not in errors:
                lines.append(dump_line(row.data | self._cells(model, results[place])))
                continue
            self.bad += 1
            self._report(row.line, errors[place])
            if o.on_error == "null":
                lines.append(dump_line(row.data | dict.fromkeys(self._new_columns()) | {"error": errors[place]}))
            else:
                skipped.append((number + place, Row(row.line, {}, errors[place])))
        self.output.append(lines, skipped)
        if end < len(rows):
            hint = "--on-error skip or null goes on past bad rows"
            return BadRow(f"{o.input.name}, line {rows[end].line}: {errors[end]} ({hint})")
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
            return [(place, item, _plain(result)) for (place, item), result in zip(good, results, strict=True)]

    def _cells(self, model: Any, results: list[tuple[Any, Any]]) -> dict[str, Any]:
        cells = {self.column + suffix: result for suffix, (_, result) in zip(self._suffixes(), results, strict=True)}
        if self.tokens:
            for suffix, (item, _) in zip(self._suffixes(), results, strict=True):
                ids = item.ids.tolist()
                cells["tokens" + suffix] = model.tokenizer.convert_ids_to_tokens(ids)
                cells["token_ids" + suffix] = ids
        return cells

    def _report(self, line: int, reason: str) -> None:
        from tqdm import tqdm

        tqdm.write(f"{self.options.input.name}, line {line}: {reason}", file=sys.stderr)


def _load(options: ModelOptions) -> Any:
    pooling: str | int = int(options.pooling) if options.pooling.lstrip("-").isdigit() else options.pooling
    given = {name: getattr(options, name) for name in ("dtype", "device", "revision", "gguf_file")}
    return rmfast.load(
        options.model,
        pooling=pooling,
        trust_remote_code=options.trust_remote_code,
        **{name: value for name, value in given.items() if value is not None},
    )


def _files_digest(folder: Path) -> str:
    """Of the names, sizes and times of a model's files: reading 16 GB of weights at every start would take 16 s."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else [folder]
    seen = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def _content_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("intervention.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cell(row: Row, column: str, parse: bool = False) -> Any:
    """The text or messages in a column; with `parse` (CSV has no lists) messages written as JSON too. Raises BadRow."""
    if column not in row.data:
        raise BadRow(f"column {column!r} is missing")
    cell = row.data[column]
    if cell is None or cell == [] or (isinstance(cell, str) and not cell.strip()):
        raise BadRow(f"column {column!r} is empty")
    if parse and isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise BadRow(f"column {column!r} holds no list of messages") from None
    if isinstance(cell, list) and cell and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in cell):
        return cell
    if not isinstance(cell, str):
        raise BadRow(f"column {column!r} holds neither text nor messages but {type(cell).__name__}")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"column {column!r} is not valid Unicode: {error.reason}") from None
    return cell


def _text(given: str) -> str:
    """A text of the command line, or after @ that of a file, without the newline that ends it."""
    if not given.startswith("@"):
        return given
    return Path(given[1:]).read_bytes().decode().removesuffix("\n").removesuffix("\r")


def _listed(name: str, given: str) -> list[int | list[int]]:
    """3,5,7-9 as [3, 5, [7, 8, 9]]."""
    found: list[int | list[int]] = []
    for item in given.split(","):
        match = re.fullmatch(r"\s*(?:(-?\d+)|(\d+)-(\d+))\s*", item)
        if match is None:
            raise ValueError(f"Expected {name} to be numbers and spans like 3,5,7-9, got {given!r}")
        one, start, end = match.groups()
        found.append(int(one) if one else list(range(int(start), int(end) + 1)))
    return found


def _flat(name: str, given: str | None) -> list[int] | None:
    """0,4-6 as [0, 4, 5, 6]."""
    if given is None:
        return None
    return [i for item in _listed(name, given) for i in (item if isinstance(item, list) else [item])]


@contextlib.contextmanager
def _located(row: Row, path: Path) -> Iterator[None]:
    """Says of a bad row where it is."""
    try:
        if row.error:
            raise BadRow(row.error)
        yield
    except BadRow as error:
        raise BadRow(f"{path.name}, line {row.line}: {error}") from None


def _baseline(row: Row, path: Path) -> Any:
    """The text, the conversation or the prompt and response of one row."""
    with _located(row, path):
        if "messages" in row.data:
            return _cell(row, "messages", parse=True)
        if "response" in row.data:
            return join(_cell(row, "prompt") if row.data.get("prompt") is not None else None, _cell(row, "response"))
        return _cell(row, "text")


def _preference(row: Row, path: Path) -> dict[str, Any]:
    """The pair of one row, with the prompt where there is one."""
    with _located(row, path):
        sides = {name: _cell(row, name) for name in ("chosen", "rejected")}
        return sides if row.data.get("prompt") is None else {"prompt": _cell(row, "prompt"), **sides}


def _numbers(name: str, given: str) -> Any:
    """A number, or length=500,overlap=100 as a dict; "search" as it is."""
    if given == "search":
        return given
    try:
        if "=" not in given:
            return int(given)
        return {key.strip(): int(value) for key, value in (item.split("=") for item in given.split(","))}
    except ValueError:
        raise ValueError(
            f'Expected {name} to be "search", a number, or like length=500,overlap=100, got {given!r}'
        ) from None


def _write_sweep(result: Any, folder: Path) -> None:
    """Result, table and, where matplotlib is installed, heat map."""
    result.save(folder)
    rows = result.rows()
    _write_rows(folder / "sweep.csv", rows, rows[0]._fields)
    _draw(result.plot, folder / "sweep.png")


def _write_rows(path: Path, rows: list[Any], names: tuple[str, ...]) -> None:
    """A CSV file, in which NaN is an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([("" if value != value else value) for value in row] for row in rows)


def _draw(plot: Callable[[], Any], path: Path) -> None:
    """Save what `plot` draws, where matplotlib is installed."""
    try:
        from matplotlib import pyplot

        pyplot.switch_backend("Agg")
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a language that the font lacks
        axes = plot()
    except ImportError as error:
        typer.echo(f"rmfast: no {path.name}: {error}", err=True)
    else:
        figure = (axes if hasattr(axes, "figure") else axes[0]).figure
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _described(result: Any, top: int) -> str:
    """The runs' rewards, what was run, and a table of the strongest sites."""
    other = {"clean": "corrupted", "corrupted": "clean"}[result.base]
    lines = [f"base reward ({result.base} text) {_show(result.base_reward)}"]
    if result.other_reward is not None:
        lines[0] += f"  other reward ({other} text) {_show(result.other_reward)}"
    lines.append(f"sites run {result.run}  without effect {result.without_effect}")
    if result.unpaired:
        lines[-1] += f"  positions without a partner {result.unpaired}"
    if result.screen:
        lines[-1] += f"  Spearman of attribution among them {result.screen['spearman']:.3f}"
    if rows := result.top(top):
        names = [name for name in rows[0]._fields if getattr(rows[0], name) is not None]
        cells = [names] + [[_shown(name, getattr(row, name)) for name in names] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells]
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    return repr(value) if name == "token" else _show(value) if isinstance(value, float) else str(value)


def _plain(result: Any) -> Any:
    """A 0-, 1- or 2-d array of rewards as floats that are short in JSON: the fewest digits that give the same fp32."""
    import numpy as np

    array = np.asarray(result)
    short = np.vectorize(lambda x: float(str(x)), otypes=[object])(array)
    return short.tolist() if array.ndim else short.item()


def _finite(value: Any) -> bool:
    return all(map(_finite, value)) if isinstance(value, list) else math.isfinite(value)


def _statistics(path: Path, column: str) -> str:
    """Mean and spread of each reward column of an output file, and the accuracy of its pairs (a tie counts half)."""
    import numpy as np

    names = [column, column + "_chosen", column + "_rejected"]
    sums: dict[str, Any] = {}
    wins: Any = 0.0
    pairs = empty = 0
    ties: Any = 0
    with path.open("rb") as file:
        for line in file:
            row = json.loads(line)
            found = {name: np.asarray(row[name], dtype=np.float64) for name in names if row.get(name) is not None}
            empty += not found
            for name, reward in found.items():
                n, mean, square = sums.get(name, (0, 0.0, 0.0))  # Welford's running mean and sum of squares
                step = reward - mean
                mean = mean + step / (n + 1)
                sums[name] = n + 1, mean, square + step * (reward - mean)
            if len(found) == 2:
                margin = found[names[1]] - found[names[2]]
                wins, ties, pairs = wins + (margin > 0) + 0.5 * (margin == 0), ties + (margin == 0), pairs + 1
    lines = []
    if pairs:
        lines.append(f"pairs {pairs}  accuracy {_show(wins / pairs)}  ties {_show(ties, 0)}")
    for name, (n, mean, square) in sums.items():
        lines.append(f"{name}  n {n}  mean {_show(mean)}  std {_show(np.sqrt(square / n))}")
    if empty:
        lines.append(f"rows without a reward {empty}")
    return "\n".join(lines) or "no rows"


def _show(value: Any, digits: int = 4) -> str:
    import numpy as np

    return " ".join(f"{x:.{digits}f}" for x in np.atleast_1d(value))


def main() -> None:
    """The console script: exit code 0, 1 for an error (one line on stderr), 2 for wrong usage, 130 when interrupted."""
    app()


if __name__ == "__main__":
    main()
