"""Ray Data on a local Ray of two actors: the same bits as `score`, killed actors, and runs that go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import models
import pytest

import rmfast

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "rmfast[ray]"')
pytest.importorskip("ray.data", reason='Ray Data is not installed: pip install "rmfast[ray]"')
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402

from rmfast.integrations import ray as on_ray  # noqa: E402

ROOT = Path(__file__).parents[2]
ROWS = [{"id": i, "prompt": f"Name {i % 7} rivers.", "response": f"{'word ' * (i % 5)}{i}"} for i in range(84)]
TEXTS = [(row["prompt"], row["response"]) for row in ROWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model with one label and a chat template."""
    path = tmp_path_factory.mktemp("model")
    models.decoder().save_pretrained(path)
    models.tokenizer(chat=True).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def rewards(folder: str) -> list[float]:
    return rmfast.load(folder).score(TEXTS).tolist()


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two CPUs, whatever the machine has; nothing that looks for a network."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(dict.fromkeys(paths)))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=4, num_gpus=0, include_dashboard=False, object_store_memory=200 << 20, logging_level="ERROR",
            log_to_driver=False,
        )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


def by_id(ds: Any) -> list[dict[str, Any]]:
    return sorted(ds.take_all(), key=lambda row: row["id"])


@pytest.mark.slow
def test_rewards_are_those_of_score_to_the_bit(folder, rewards):
    ds = ray.data.from_items(ROWS, override_num_blocks=5)
    rows = by_id(on_ray.score(ds, folder, workers=2, num_cpus=0.5, batch_rows=24))
    assert [row["reward"] for row in rows] == rewards
    assert [{name: row[name] for name in ("id", "prompt", "response")} for row in rows] == ROWS
    assert all(row["error"] is None for row in rows)


def test_responses_to_a_prompt_are_in_one_batch():
    table = pa.Table.from_pylist(ROWS)
    keyed = on_ray._keyed(table, "response", on_ray.Names())
    packs = on_ray._packed(keyed.sort_by(on_ray._KEY), 30).column("rows").to_pylist()
    found = [pa.ipc.open_stream(pack).read_all().to_pylist() for pack in packs]
    assert [len(pack) for pack in found] == [24, 24, 24, 12]  # two prompts each, of 12 responses
    assert sorted((row for pack in found for row in pack), key=lambda row: row["id"]) == ROWS
    assert len(on_ray._packed(keyed.sort_by(on_ray._KEY), 5)) == 7  # a prompt with more is a batch of its own
    assert len(on_ray._packed(keyed.slice(0, 0), 5)) == 0


@pytest.mark.slow
def test_values_pairs_and_rows_that_can_not_be_scored(folder):
    rm = rmfast.load(folder)
    ds = ray.data.from_items([{"id": i, "q": p, "a": r} for i, (p, r) in enumerate([*TEXTS[:6], ("p", " ")])])
    names = {"prompt": "q", "response": "a"}
    rows = by_id(on_ray.values(ds, folder, columns=names, column="each", num_cpus=0.5, group=False))
    assert [row["each"] for row in rows[:6]] == [value.tolist() for value in rm.token_values(TEXTS[:6])]
    assert rows[6]["each"] is None and rows[6]["error"] == "column 'a' is empty"
    with pytest.raises(Exception, match="column 'a' is empty"):
        on_ray.score(ds, folder, columns=names, on_error="raise", num_cpus=0.5, group=False).take_all()
    pairs = [{"id": i, "prompt": p, "chosen": r, "rejected": "no"} for i, (p, r) in enumerate(TEXTS[:6])]
    rows = by_id(on_ray.score(ray.data.from_items(pairs), folder, num_cpus=0.5))
    assert [row["reward_chosen"] for row in rows] == rm.score(TEXTS[:6]).tolist()
    assert [row["reward_rejected"] for row in rows] == rm.score([(p, "no") for p, _ in TEXTS[:6]]).tolist()


def actors() -> list[psutil.Process]:
    """The processes of this cluster's actors that hold a model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_killed_actor_loses_nothing(folder, rewards):
    many = [{**row, "id": i * len(ROWS) + row["id"]} for i in range(20) for row in ROWS]
    ds = ray.data.from_items(many, override_num_blocks=60)
    scored = on_ray.score(ds, folder, workers=2, num_cpus=0.5, batch_rows=2, group=False)
    rows: list[dict[str, Any]] = []
    for batch in scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        if not rows:  # the actors have begun
            os.kill(actors()[0].pid, signal.SIGKILL)
        rows += batch.to_pylist()
    rows.sort(key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(len(many)))
    assert [row["reward"] for row in rows] == rewards * 20


@pytest.mark.slow
def test_a_run_goes_on_where_it_ended(folder, rewards, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    last = ROWS[-1]["id"]
    for part in range(6):
        rows = [{**row, "response": "!"} if row["id"] == last else row for row in ROWS[part::6]]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / f"{part}.parquet")

    out = tmp_path / "out"

    def late(item: Any) -> Any:
        """One row can't be read, which shows only once others are written."""
        import time

        deadline = time.monotonic() + 60
        while item["response"] == "!":
            if list(out.glob("*.parquet")) or time.monotonic() > deadline:
                raise ValueError("not today")
            time.sleep(0.1)
        return item

    def go(**options: Any) -> None:
        ds = ray.data.read_parquet(str(tmp_path / "in"), override_num_blocks=6)
        checkpoint = ("id", str(tmp_path / "checkpoint"))
        scored = on_ray.score(
            ds, folder, workers=2, num_cpus=0.5, on_error="raise", checkpoint=checkpoint, blocks=6, **options
        )
        scored.write_parquet(str(out))

    def written() -> list[dict[str, Any]]:
        return [row for file in sorted(out.glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]

    with pytest.raises(Exception, match="not today"):
        go(format=late)
    before = {row["id"] for row in written()}
    assert before and last not in before
    go()
    rows = sorted(written(), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]  # each once
    want = [*rewards[:-1], rmfast.load(folder).score([(ROWS[-1]["prompt"], "!")]).item()]
    assert [row["reward"] for row in rows] == want


@pytest.mark.parametrize(
    "given, message",
    [
        ({"workers": 0}, "workers to be a positive int"),
        ({"batch_rows": 2.5}, "batch_rows to be a positive int"),
        ({"on_error": "skip"}, "on_error"),
        ({"columns": ["text"]}, "columns to be of id, prompt, response, got text"),
        ({"column": "id"}, "new column 'id' not to be in the table"),
        ({"checkpoint": ("word", "/tmp/x")}, "checkpoint to name a column of ids"),
        ({"checkpoint": "id"}, "checkpoint to be"),
        ({"model": 3}, "model to be a str: a folder or hub id"),
        ({"ds": [1]}, "ds to be a Dataset"),
    ],
)
def test_arguments_that_are_wrong_are_named(given, message):
    ds = given.pop("ds", None) or ray.data.from_items(ROWS[:2])
    with pytest.raises((ValueError, TypeError), match=message):
        on_ray.score(ds, given.pop("model", "model"), **given)
