"""`rmfast steps`: every solution of a file with the rewards of its steps."""

import dataclasses
import json
from typing import Annotated, Any, Literal

import typer

from rmfast.cli.options import Options, load_model, with_options
from rmfast.cli.rows import Layout
from rmfast.cli.run import Run
from rmfast.texts.columns import BadRow, cell_of, template_columns
from rmfast.texts.tables import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions(Options):
    """Those of `rmfast steps`."""

    prompt_column: Annotated[str, typer.Option(help="The question.")] = "question"
    steps_column: Annotated[str, typer.Option(help="A list of texts, or a list of such lists.")] = "steps"


@with_options
def steps(
    options: StepOptions,
    reduce: Annotated[
        Literal["min", "prod", "last", "mean"] | None, typer.Option(help="One number for each solution.")
    ] = None,
    separator: Annotated[str | None, typer.Option(help="Text behind each step, whose last token is read.")] = None,
    answer: Annotated[str | None, typer.Option(help="Each step is a turn that the model answers so (RLHFlow).")] = None,
    step_tag_id: Annotated[int | None, typer.Option(min=0, help="The token that ends a step.")] = None,
    returned_token_ids: Annotated[
        str | None, typer.Option(help="RIGHT,WRONG: ids of two tokens of a language model, by which it judges.")
    ] = None,
    activation: Annotated[
        Literal["sigmoid", "softmax", "none"] | None, typer.Option(help="Default: as the model's head says.")
    ] = None,
) -> None:
    """Write every row with the rewards at its steps' ends.

    Rows hold a question and its steps, or a text with a tag behind each step (see docs/steps.md).
    """
    if options.truncation != "error":
        raise ValueError("Expected no --truncation, which would take steps away")
    if options.columns not in (None, "text"):
        raise ValueError(f"Expected --columns to be text, or to be left out for steps, got {options.columns}")
    if returned_token_ids is not None and not all(each.strip().isdigit() for each in returned_token_ids.split(",")):
        raise ValueError(f"Expected --returned-token-ids to be two ids, RIGHT,WRONG, got {returned_token_ids}")
    run = _Steps(options, separator, answer, step_tag_id, returned_token_ids)
    run.go("step_scores", reduce=reduce, step_tag_id=step_tag_id, activation=activation)


class _Layout(Layout):
    """Rows of a question and its steps, or of several solutions; or texts with tags."""

    def inputs(self, row: Row) -> list[Any]:
        if self.mode == "text":
            return super().inputs(row)
        if row.error:
            raise BadRow(row.error)
        if taken := self._taken(row.data):
            raise BadRow(f"has a column {taken[0]!r} of its own: give another --output-column")
        question, own = cell_of(row, self.options.prompt_column), template_columns(row)
        if own:
            raise BadRow(f"has {', '.join(own)}, which steps are scored without: give the option")
        return [(question, steps) for steps in self._solutions(row)[0]]

    def cells(self, model: Any, row: Row, results: list[tuple[Any, Any]]) -> dict[str, Any]:
        found = [result for _, result in results]
        return {self.column: found if self.mode != "text" and self._solutions(row)[1] else found[0]}

    def _solutions(self, row: Row) -> tuple[list[Any], bool]:
        """The lists of steps of a row, and whether it holds several."""
        name = self.options.steps_column  # type: ignore[attr-defined]
        cell = row.data.get(name)
        if isinstance(cell, str):  # in CSV
            try:
                cell = json.loads(cell)
            except ValueError:
                raise BadRow(f"column {name!r} is text: expected a list of steps") from None
        if not isinstance(cell, list) or not cell:
            raise BadRow(f"column {name!r} holds no steps")
        several = isinstance(cell[0], list)
        return (cell if several else [cell]), several

    def _mode_of(self, data: dict[str, Any]) -> Any:
        o: Any = self.options
        for mode, names in (("response", (o.prompt_column, o.steps_column)), ("text", (o.text_column,))):
            if all(name in data for name in names):
                return mode
        raise ValueError(
            f"Expected columns {o.prompt_column}+{o.steps_column} or {o.text_column}, got {', '.join(data) or 'none'}; "
            "--prompt-column, --steps-column and --text-column say what yours are called"
        )


class _Steps(Run):
    layout: _Layout

    def __init__(
        self, options: StepOptions, separator: str | None, answer: str | None, tag: int | None, tokens: str | None
    ) -> None:
        super().__init__("steps", options, options.output_column or "step_scores", layout=_Layout)
        self.run |= {"separator": separator, "answer": answer, "returned_token_ids": tokens}
        self.ends: dict[str, Any] = {"separator": separator, "answer": answer, "step_tag_id": tag}
        self.judges = None if tokens is None else [int(each) for each in tokens.split(",")]

    def load(self) -> Any:
        from rmfast.heads import TokenHead

        return load_model(self.options, **({} if self.judges is None else {"head": TokenHead(*self.judges)}))

    def encode(self, model: Any, inputs: list[Any]) -> list[Any]:
        if self.layout.mode == "text":
            return super().encode(model, inputs)
        from rmfast.rewards.steps import solutions

        encoding = {name: value for name, value in self.encoding.items() if name != "truncation"}
        questions, steps = [question for question, _ in inputs], [own for _, own in inputs]
        return solutions(model, questions, steps, errors="return", **self.ends, **encoding)
