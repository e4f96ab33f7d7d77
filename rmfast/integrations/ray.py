"""Ray Data: rewards of a dataset's rows by actors on one machine or a cluster."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import rmfast
from rmfast import arguments
from rmfast.integrations.batches import METHODS, Batches, columns_of
from rmfast.texts.columns import Columns, Names

try:
    import pyarrow as pa
    import ray
except ImportError as error:
    raise ImportError('rmfast.integrations.ray needs Ray Data: pip install "rmfast[ray]"') from error

__all__ = ["score", "values"]

_KEY = "__rmfast_prompt"  # a column while rows are on their way to each other
_PACK = "rows"


def score(
    ds: Any,
    model: str,
    *,
    columns: Mapping[str, str] | Sequence[str] | None = None,
    values: bool = False,
    column: str | None = None,
    workers: int = 1,
    num_gpus: float = 0,
    num_cpus: float = 1,
    batch_rows: int = 4096,
    group: bool = True,
    blocks: int | None = None,
    on_error: Literal["column", "raise"] = "column",
    checkpoint: tuple[str, str] | None = None,
    load: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A dataset with the reward of each row as a new column, as `RewardModel.score` gives it.

    Rows are brought together by prompt, so that responses to one run in one batch, which computes it once; they come
    out in another order: keep a column by which you know them. Nothing runs before the result is read or written.

    Args:
        ds: a `ray.data.Dataset`.
        model: a folder that every machine sees, or a hub id; each actor loads it.
        columns: what is scored, of prompt, response, chosen, rejected, messages, text, like ["prompt", "response"]; or
            what the dataset calls them, like {"prompt": "question", "response": "answer"}. Default: those that it has.
        values: the reward at every token, as `RewardModel.token_values` gives it.
        column: the new one; default reward, or values. Of pairs there are two, ending in _chosen and _rejected.
        workers: actors, of `num_gpus` and `num_cpus` each (without a GPU of its own an actor runs on its CPUs).
        batch_rows: rows of a call of `score`; a prompt with more responses is a batch of its own.
        group: bring rows together by prompt; False where they already are, or have none. Texts and pairs, whose
            prompts are in one row, are never moved.
        blocks: parts into which rows are moved by prompt; each must fit into the memory of a task. Default 4 a worker.
        on_error: at a row that can't be scored "column" writes null and the reason in a column `error`; "raise" ends
            the run with it.
        checkpoint: (column of unique ids, folder), by which the same script goes on where it ended: rows that are
            written are left out of the next run. For datasets that are read from files and written to files.
        load: arguments of `rmfast.load`: dtype, pooling, head, invariant, ...
        **options: of `rm.score`: max_length, truncation, format, batch_tokens, engine, normalize, ...

    Returns:
        A lazy `ray.data.Dataset`: the columns of `ds`, the rewards (fp32; fp64 of an fp64 model; lists of K for K
        rewards, of T for values), and with on_error="column" `error`. An actor that dies is started again, and its
        batch with it.

    Raises:
        ValueError, TypeError: an argument is wrong, or the dataset has no such columns or already the new one.
    """
    arguments.instance("ds", ds, ray.data.Dataset)
    arguments.instance("model", model, str, ": a folder or hub id, which actors load")
    for name, value in (("workers", workers), ("batch_rows", batch_rows)):
        arguments.whole(name, value, 1)
    for name, number in (("num_gpus", num_gpus), ("num_cpus", num_cpus)):
        arguments.number(name, number, 0)
    arguments.word("on_error", on_error, ("column", "raise"))
    method = "token_values" if arguments.flag("values", values) else "score"
    present = ds.columns() or []
    mode, names = columns_of(columns, present)
    new = METHODS[method] if column is None else arguments.instance("column", column, str)
    batches = Batches(mode, names, new, method, on_error, options)
    batches.expect_new(present)
    if checkpoint is not None:
        ds.context.checkpoint_config = _checkpoint(checkpoint, present)
    grouped = arguments.flag("group", group) and mode in ("response", "messages")
    if grouped:
        blocks = 4 * workers if blocks is None else arguments.whole("blocks", blocks, 1)
        of = {"mode": mode, "names": names}
        ds = ds.map_batches(_keyed, batch_size=None, batch_format="pyarrow", fn_kwargs=of)
        ds = ds.repartition(num_blocks=blocks, keys=[_KEY], sort=True)
        ds = ds.map_batches(_packed, batch_size=None, batch_format="pyarrow", fn_kwargs={"most": batch_rows})
    return ds.map_batches(
        _Actor,
        fn_constructor_kwargs={"model": model, "load": dict(load or {}), "batches": batches},
        batch_size=1 if grouped else batch_rows,  # a number, which Ray asks for with GPUs
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=num_gpus,
        num_cpus=num_cpus,
    )


def values(ds: Any, model: str, **settings: Any) -> Any:
    """A dataset with the reward at every token of each row: arguments, result and errors are those of `score`."""
    return score(ds, model, values=True, **settings)


def _checkpoint(given: Any, present: list[str]) -> Any:
    from ray.data.checkpoint import CheckpointConfig

    column, path = arguments.sequence("checkpoint", given, "(column of ids, folder)", 2)
    if column not in present:
        raise ValueError(f"Expected checkpoint to name a column of ids, of {', '.join(present)}, got {column}")
    return CheckpointConfig(id_column=column, checkpoint_path=arguments.instance("a folder", path, str))


def _keyed(table: pa.Table, mode: Columns, names: Names) -> pa.Table:
    """With a number for each row's prompt: of a conversation all but its last turn."""
    cells = table.column(names.prompt if mode == "response" else names.messages).to_pylist()
    if mode == "messages":
        cells = [cell[:-1] if isinstance(cell, list) else cell for cell in cells]
    keys = [
        int.from_bytes(hashlib.blake2b(json.dumps(cell, default=str).encode(), digest_size=7).digest(), "big")
        for cell in cells
    ]
    return table.append_column(pa.field(_KEY, pa.int64()), pa.array(keys, pa.int64()))


def _packed(table: pa.Table, most: int) -> pa.Table:
    """Rows that are sorted by prompt, as packs of at most so many, none of which ends amid a prompt's rows."""
    packs = [_bytes(table.slice(start, stop - start).drop_columns([_KEY])) for start, stop in _spans(table, most)]
    return pa.table({_PACK: pa.array(packs, pa.large_binary())})


def _spans(table: pa.Table, most: int) -> Iterator[tuple[int, int]]:
    keys = table.column(_KEY).to_pylist()
    start = end = 0  # of the pack, and of what is in it for sure
    for row in range(1, len(keys) + 1):
        if row < len(keys) and keys[row] == keys[row - 1]:
            continue
        if end > start and row - start > most:
            yield start, end
            start = end
        end = row
    if end > start:
        yield start, end


def _bytes(table: pa.Table) -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return file.getvalue()


class _Actor:
    """A model, and batches of rows or of packs of them through it."""

    def __init__(self, model: str, load: dict[str, Any], batches: Batches) -> None:
        self.rm = rmfast.load(model, **load)
        self.batches = batches
        wide = any(str(each.dtype) == "torch.float64" for each in self.rm.model.parameters())
        kind = pa.float64() if wide else pa.float32()
        if self.rm.num_labels > 1:
            kind = pa.list_(kind)
        self.kind = pa.list_(kind) if batches.method == "token_values" else kind

    def __call__(self, table: pa.Table) -> pa.Table:
        if table.column_names == [_PACK]:
            (pack,) = table.column(_PACK).to_pylist()
            table = pa.ipc.open_stream(pack).read_all()
        new = self.batches.score(self.rm, table.to_pylist())
        for name, cells in new.items():
            kind = pa.string() if name == "error" else self.kind
            table = table.append_column(pa.field(name, kind), pa.array(cells, kind))
        return table
