"""`rmfast sweep`: two texts in; a folder with the patched rewards, a table and a heat map out."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rmfast.cli.options import (
    ModelOptions,
    chosen_backend,
    encoding_of,
    files_of_options,
    load_model,
    text_of_option,
    with_options,
)
from rmfast.cli.results import claimed, save_plot, show, write_csv
from rmfast.cli.rows import located
from rmfast.texts.columns import cell_of, template_columns
from rmfast.texts.pairs import join
from rmfast.texts.tables import Row, read_rows

_SPAN = 10**6  # longer than any text: 0-999999999999 would fill the memory
_FILES = ("sweep.safetensors", "sweep.json", "sweep.csv", "sweep.png")


@with_options
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
    """Patch every site of a run and write the rewards.

    Written are the result, a CSV and a heat map (see docs/sweep.md).
    """
    if (output / "sweep.json").exists() and not overwrite:
        raise ValueError(f"Expected --output to hold no sweep, got {output}; --overwrite starts anew")
    ask = text_of_option(prompt)
    texts = [join(ask, text_of_option(given)) for given in (clean, corrupted) if given is not None]
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
        "batch_tokens": options.batch_tokens,
        **encoding_of(options),
    }
    kept = checkpoint or output / "checkpoint.safetensors"
    reads = files_of_options(clean, corrupted, prompt, options.tools, options.chat_template_kwargs)
    reads += [*([] if baseline is None else [baseline]), *([] if checkpoint is None else [checkpoint])]
    from rmfast.patching.checkpoint import discard

    with claimed(output, _FILES, reads), chosen_backend(options):
        if overwrite:
            discard(kept)
        model = load_model(options)
        progress = sys.stderr.isatty()
        try:
            result = model.patch_sweep(*texts, **chosen, align=align, seed=seed, checkpoint=kept, progress=progress)
        except KeyboardInterrupt as error:
            error.args = ("(the same command goes on where it stopped)",)
            raise
        _write_sweep(result, output)
        if checkpoint is None:
            discard(kept)
    typer.echo(_described(result, top))


def _listed(name: str, given: str) -> list[int | list[int]]:
    """3,5,7-9 as [3, 5, [7, 8, 9]]."""
    found: list[int | list[int]] = []
    for item in given.split(","):
        match = re.fullmatch(r"\s*(?:(-?\d+)|(\d+)-(\d+))\s*", item)
        if match is None:
            raise ValueError(f"Expected {name} to be numbers and spans like 3,5,7-9, got {given!r}")
        one, start, end = match.groups()
        if not one and int(end) - int(start) > _SPAN:
            raise ValueError(f"Expected spans of {name} to hold at most {_SPAN} numbers, got {item}")
        found.append(int(one) if one else list(range(int(start), int(end) + 1)))
    return found


def _flat(name: str, given: str | None) -> list[int] | None:
    """0,4-6 as [0, 4, 5, 6]."""
    if given is None:
        return None
    return [i for item in _listed(name, given) for i in (item if isinstance(item, list) else [item])]


def _baseline(row: Row, path: Path) -> Any:
    """The text, the conversation or the prompt and response of one row."""
    with located(row, path):
        own = template_columns(row)
        if "messages" in row.data:
            return {"messages": cell_of(row, "messages", parse=True), **own}
        if "response" in row.data:
            prompt = cell_of(row, "prompt") if row.data.get("prompt") is not None else None
            return {"prompt": prompt, "response": cell_of(row, "response"), **own}
        return cell_of(row, "text")


def _write_sweep(result: Any, folder: Path) -> None:
    """Result, table and, where matplotlib is installed, heat map."""
    result.save(folder)
    rows = result.rows()
    write_csv(folder / "sweep.csv", rows, rows[0]._fields)
    save_plot(result.plot, folder / "sweep.png")


def _described(result: Any, top: int) -> str:
    """The runs' rewards, what was run, and a table of the strongest sites."""
    other = {"clean": "corrupted", "corrupted": "clean"}[result.base]
    lines = [f"base reward ({result.base} text) {show(result.base_reward)}"]
    if result.other_reward is not None:
        lines[0] += f"  other reward ({other} text) {show(result.other_reward)}"
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
    return repr(value) if name == "token" else show(value) if isinstance(value, float) else str(value)
