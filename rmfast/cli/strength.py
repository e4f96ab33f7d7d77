"""`rmfast strength`: preference pairs with the margin that several reward models give them."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from rmfast.cli.options import Options, load_model, with_options
from rmfast.cli.rows import Layout
from rmfast.cli.run import Run, model_files
from rmfast.texts.remote import Location
from rmfast.texts.tables import Row


@with_options
def strength(
    options: Options,
    member: Annotated[list[str], typer.Option(help="Another model, beside --model; several times for more.")],
    flip: Annotated[
        bool, typer.Option("--flip", help="Exchange chosen and rejected where the margin is below 0.")
    ] = False,
) -> None:
    """Write every pair with its margin over several models.

    Its mean and its spread, as in Secrets of RLHF II (see docs/ensembles.md).
    """
    if options.columns not in (None, "pairs"):
        raise ValueError(f"Expected --columns to be pairs, got {options.columns}")
    run = _Strength(options, member, flip)
    run.go("score")


class _Layout(Layout):
    """Pairs alone, and their margins."""

    def __init__(self, *given: Any, flip: bool) -> None:
        self.flip = flip
        super().__init__(*given)

    def new_columns(self) -> list[str]:
        cut = [f"truncated{side}" for side in ("_chosen", "_rejected")] if self.cuts else []
        return [self.column, f"{self.column}_std", *(["flipped"] if self.flip else []), *cut]

    def cells(self, model: Any, row: Row, results: list[tuple[Any, Any]]) -> dict[str, Any]:
        import torch

        from rmfast.rewards.ensemble import moments

        (one, chosen), (other, rejected) = results
        margins = torch.tensor(chosen, dtype=torch.float64) - torch.tensor(rejected, dtype=torch.float64)
        average, variance = moments(margins[:, None])
        mean, std = (float(str(x.float().numpy()[0])) for x in (average, variance.sqrt()))
        cells: dict[str, Any] = {self.column: mean, f"{self.column}_std": std}
        if self.flip:
            o, flipped = self.options, mean < 0
            cells["flipped"] = flipped
            if flipped:
                sides = o.chosen_column, o.rejected_column
                cells |= {self.column: -mean, sides[0]: row.data[sides[1]], sides[1]: row.data[sides[0]]}
        if self.cuts:
            cells |= {"truncated_chosen": one.cut > 0, "truncated_rejected": other.cut > 0}
        return cells

    def _mode_of(self, data: dict[str, Any]) -> Any:
        if (mode := super()._mode_of(data)) != "pairs":
            o = self.options
            raise ValueError(f"Expected columns {o.chosen_column} and {o.rejected_column}, got {', '.join(data)}")
        return mode


class _Members:
    """An ensemble as the run takes a model: all members' rewards of each text."""

    def __init__(self, models: list[Any]) -> None:
        from rmfast.rewards.ensemble import Ensemble

        self.ensemble, self.first = Ensemble(models), models[0]
        self.model, self.encode = self.first.model, self.first.encode
        if not self.ensemble.same_ids:  # texts are encoded once, to be reported where they are bad
            raise ValueError("Expected --member to be models with the tokenizer and limits of --model")

    def score(self, items: list[Any], **given: Any) -> Any:
        return self.ensemble.score(items, **given).members.T


class _Strength(Run):
    def __init__(self, options: Options, members: list[str], flip: bool) -> None:
        layout = functools.partial(_Layout, flip=flip)
        super().__init__("strength", options, options.output_column or "margin", layout=layout)
        self.members = members
        self.run |= {"flip": flip, "members": [self.digest_of_model(member) for member in members]}

    def load(self) -> Any:
        others = [dataclasses.replace(self.options, model=member) for member in self.members]
        return _Members([load_model(each) for each in (self.options, *others)])

    def _reads(self) -> Iterator[Location]:
        yield from super()._reads()
        for member in self.members:
            yield from model_files(Path(member))
