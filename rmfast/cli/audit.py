"""`rmfast audit`: preference pairs in; one page that shows what the model does with them, and its data, out."""

import dataclasses
import itertools
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rmfast.cli.options import (
    ModelOptions,
    Options,
    chosen_backend,
    encoding_of,
    files_of_options,
    load_model,
    with_options,
)
from rmfast.cli.results import claimed
from rmfast.cli.run import Run
from rmfast.texts.log import expect_same
from rmfast.texts.output import Output

_FILES = ("index.html", "audit.json", "data.jsonl")


@with_options
def audit(
    options: ModelOptions,
    pairs: Annotated[
        Path,
        typer.Option(
            help="Columns chosen, rejected and, where there are, prompt, subset, id: .jsonl, .csv or .parquet.",
            exists=True,
            dir_okay=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write, or to go on with.", file_okay=False)],
    sample: Annotated[int | None, typer.Option(min=2, help="Take so many pairs at random; default: all.")] = None,
    show: Annotated[int, typer.Option(min=1, max=10, help="Pairs of each kind to show.")] = 5,
    sweep_pairs: Annotated[int, typer.Option(min=0, max=10, help="Of the shown pairs, how many are patched.")] = 2,
    debias: Annotated[
        bool, typer.Option("--debias/--no-debias", help="Fit a clamp on half of the prompts, and report with it.")
    ] = True,
    trials: Annotated[int, typer.Option(min=1, help="Of the search for the clamp.")] = 20,
    parity: Annotated[int, typer.Option(min=0, help="Also score so many texts alone, in batches, ...")] = 16,
    on_error: Annotated[Literal["stop", "null"], typer.Option(help="At a bad row: stop, or leave it out.")] = "stop",
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap over prompts.")] = 1000,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    window: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Rows scored and written at a time.")] = 512,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the output exists.")] = False,
) -> None:
    """Write one HTML page of what a reward model does with pairs.

    A run that was stopped goes on (see docs/audit.md).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"Expected --confidence to be in (0, 1), got {confidence}")
    from rmfast.audit import Kept, Settings, collect, render
    from rmfast.audit.charts import altair
    from rmfast.cli.benchmark import SCORES, BenchmarkRows, figures_of
    from rmfast.evaluation.layouts import LAYOUTS
    from rmfast.texts.tables import read_rows

    altair()  # what the page needs is missed now, not after minutes
    settings = Settings(show, sweep_pairs, debias, trials, parity, seed, options.batch_tokens)
    layout = LAYOUTS["pairs"]
    reads = [pairs, *files_of_options(options.tools, options.chat_template_kwargs)]
    with claimed(output, _FILES, reads):
        if sum(1 for _ in itertools.islice(read_rows(pairs), 2)) < 2:
            raise ValueError(f"Expected at least 2 pairs in {pairs.name}, which an audit compares")
        input_ = pairs if sample is None else _sampled(pairs, sample, seed, output / "data.jsonl")
        own = {field.name: getattr(options, field.name) for field in dataclasses.fields(ModelOptions)}
        shared: dict[str, Any] = {"on_error": on_error, "window": window, "overwrite": overwrite, "shard": "0/1"}
        given = Options(**own, input=input_, output=output / "rows.jsonl", **shared)
        run = _Run("audit", given, SCORES, layout=lambda *_: BenchmarkRows(layout, None), layout_name=layout.name)
        of = dict(run.run)
        run.go(layout.method)
        found = figures_of(layout, given, None, resamples=resamples, confidence=confidence, seed=seed)
        kept = Kept(output / "sections", [of, run.scored_by()])
        facts = {"command": shlex.join(["rmfast", *sys.argv[1:]]), "pairs": pairs.name}
        facts |= {"SHA-256 of the pairs": of["input_sha256"], "sampled": "all" if sample is None else f"{sample} rows"}
        name = Path(of["model"]).name if Path(options.model).exists() else options.model
        with chosen_backend(options):
            result = collect(
                run.load, found, model=name, settings=settings, kept=kept, facts=facts,
                say=lambda name: typer.echo(f"rmfast: section {name}", err=True), **encoding_of(options),
            )  # fmt: skip
        result.save(output / "audit.json")
        page = render(result)
        (output / "index.html").write_text(page, encoding="utf-8")
    for name, why in result.missing.items():
        typer.echo(f"rmfast: no {name}: {why}", err=True)
    typer.echo(f"{found}\n\n{output / 'index.html'}: {len(page.encode()) / 1e6:.1f} MB")


class _Run(Run):
    """A run whose model is loaded once, for the scores or for what comes after them."""

    model: Any = None
    output: Output

    def load(self) -> Any:
        """Raises ValueError where the scores are there, and are of another revision of a model on the hub."""
        if self.model is None:
            model = load_model(self.options)
            if self.output.header is not None:
                expect_same(self.output.path, self.output.header, self.revisions(model))
            self.model = model
        return self.model

    def scored_by(self) -> dict[str, Any]:
        """The revisions of the model by which the scores are."""
        assert self.output.header is not None
        return {name: self.output.header.get(name) for name in ("model_revision", "adapter_revision")}


def _sampled(pairs: Path, count: int, seed: int, path: Path) -> Path:
    """Some rows at random, in their order, as a JSONL file."""
    import numpy as np

    from rmfast.evaluation.data import cells_of
    from rmfast.texts.tables import dump_line, read_rows

    total = sum(1 for _ in read_rows(pairs))
    some = set(np.random.default_rng(seed).permutation(total)[:count].tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for place, row in enumerate(read_rows(pairs)):
            if place in some:
                file.write(dump_line(cells_of(row)))
    return path
