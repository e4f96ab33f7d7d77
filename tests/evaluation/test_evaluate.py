"""`evaluation.evaluate` on a small model: its scores, its inputs' forms, its errors, and what its result writes."""

from __future__ import annotations

import json
import random

import models
import numpy as np
import pytest
import written

import rmfast
from rmfast import evaluation


@pytest.fixture(scope="module")
def rm():
    return rmfast.RewardModel(models.decoder(), models.tokenizer(chat=True))


@pytest.mark.parametrize("make", [written.pairs, written.rewardbench, written.rewardbench2, written.rm_bench])
def test_scores_are_those_of_each_text_alone(rm, make):
    rows = make()
    got = evaluation.evaluate(rm, rows, resamples=20)
    for row, item, scores in zip(rows, got.items, got.scores):
        sides = [side if isinstance(side, list) else [side] for side in (row["chosen"], row["rejected"])]
        alone = [float(rm.score([(row["prompt"], text)])) for side in sides for text in side]
        assert scores == pytest.approx(alone, abs=1e-5)
        assert len(item.inputs) == len(alone)
    again = evaluation.evaluated(got.layout, got.items, got.scores, resamples=20)
    assert again.rows == got.rows


def test_rows_come_from_every_kind_of_file(rm, tmp_path):
    rows = written.rewardbench2()
    expected = evaluation.evaluate(rm, rows).rows
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "b.json"):
        assert evaluation.evaluate(rm, tmp_path / name).rows == expected
        assert evaluation.evaluate(rm, str(tmp_path / name)).rows == expected


def test_conversations_of_a_csv_file_are_read(rm, tmp_path):
    rows = written.pairs(4)
    talks = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in rows
    ]
    cells = "\n".join(
        ",".join('"' + cell.replace('"', '""') + '"' for cell in (json.dumps(t["prompt"]), t["chosen"], t["rejected"]))
        for t in talks
    )
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n" + cells + "\n")
    for got in (evaluation.evaluate(rm, tmp_path / "a.csv"), evaluation.evaluate(rm, talks)):
        expected = rm.score([(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")])
        assert np.concatenate(got.scores) == pytest.approx(expected.tolist(), abs=1e-5)
        assert got["all", "accuracy"].prompts == 2


def test_whole_conversations_share_their_prompt(rm):
    rows = [
        {side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
         for side in ("chosen", "rejected")} | {"prompt": row["prompt"]}
        for row in written.pairs(6)
    ]  # fmt: skip
    with_prompt = evaluation.evaluate(rm, rows)
    without = evaluation.evaluate(rm, [{name: row[name] for name in ("chosen", "rejected")} for row in rows])
    for a, b in zip(with_prompt.scores, without.scores):
        assert a == pytest.approx(b, abs=1e-6)
    assert with_prompt["all", "accuracy"].prompts == without["all", "accuracy"].prompts == 3


def test_options_go_to_score(rm):
    long = [{"prompt": "x" * 300, "chosen": "a", "rejected": "b"}]
    with pytest.raises(rmfast.InputError):
        evaluation.evaluate(rm, long)
    got = evaluation.evaluate(rm, long, truncation="left", max_length=20)
    expected = rm.score([("x" * 300, "a"), ("x" * 300, "b")], truncation="left", max_length=20)
    assert got.scores[0] == pytest.approx(expected.tolist(), abs=1e-6)


def test_what_is_wrong_is_said(rm):
    three = rmfast.RewardModel(models.decoder(labels=3), models.tokenizer(chat=True))
    with pytest.raises(ValueError, match="model of one reward, got one of 3"):
        evaluation.evaluate(three, written.pairs())
    with pytest.raises(TypeError, match="Expected rm to be a Scorer"):
        evaluation.evaluate(None, written.pairs())
    with pytest.raises(ValueError, match="at least one row"):
        evaluation.evaluate(rm, [])
    with pytest.raises(TypeError, match=r"data\[0\] to be a mapping"):
        evaluation.evaluate(rm, ["a"])
    with pytest.raises(TypeError, match="a file, a name or rows"):
        evaluation.evaluate(rm, {"prompt": "a"})
    with pytest.raises(ValueError, match="a file or one of rewardbench, "):
        evaluation.evaluate(rm, "no-such-file.jsonl")
    with pytest.raises(ValueError, match="layout to be one of"):
        evaluation.evaluate(rm, written.pairs(), layout="best")
    with pytest.raises(ValueError, match="confidence"):
        evaluation.evaluate(rm, written.pairs(), confidence=1.0)


def test_a_layout_that_is_named_is_taken(rm):
    rows = written.rewardbench()
    got = evaluation.evaluate(rm, rows, layout="pairs")
    assert got.layout.name == "pairs" and ("all", "mean of subsets") in {row[:2] for row in got.rows}


def test_a_benchmark_by_name_is_taken_from_the_cache(rm, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{name: cell for name, cell in row.items() if cell is not None} for row in written.rewardbench2()]
    (tmp_path / "data").mkdir()
    for i, part in enumerate((rows[:5], rows[5:])):
        parquet.write_table(pa.Table.from_pylist(part), tmp_path / "data" / f"test-{i}.parquet")
    asked = []

    def snapshot_download(repository, **kw):
        asked.append((repository, kw["repo_type"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert evaluation.evaluate(rm, "rewardbench2").rows == evaluation.evaluate(rm, rows).rows
    assert asked == [("allenai/reward-bench-2", "dataset")]
    with pytest.raises(ValueError, match="Expected files data/filtered"):
        evaluation.evaluate(rm, "rewardbench")


def test_without_a_network_the_name_of_a_benchmark_says_what_to_do(rm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, (repository, pattern) in evaluation.PUBLISHED.items():
        with pytest.raises(ValueError, match="give a file that was downloaded elsewhere") as caught:
            evaluation.evaluate(rm, name)
        assert repository in str(caught.value) and pattern in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [written.pairs, written.rm_bench])
def test_another_column_tells_figures_apart(rm, make):
    rows = [{**row, "kind": f"kind {i % 2}", "level": i % 3} for i, row in enumerate(make())]
    got = evaluation.evaluate(rm, rows, subset_column="kind")
    assert {row.subset for row in got.rows} == {"kind 0", "kind 1", "all"}
    assert np.concatenate(got.scores).tolist() == np.concatenate(evaluation.evaluate(rm, rows).scores).tolist()
    assert {row.subset for row in evaluation.evaluate(rm, rows, subset_column="level").rows} == {"0", "1", "2", "all"}
    with pytest.raises(ValueError, match="line 1: column 'none' holds no text or whole number for a subset but None"):
        evaluation.evaluate(rm, rows, subset_column="none")


def test_the_table_and_the_plot_show_every_figure(rm):
    pytest.importorskip("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    got = evaluation.evaluate(rm, written.rewardbench2())
    lines = str(got).splitlines()
    assert lines[0] == "rewardbench2: 22 rows"
    assert len(lines) == 2 + len(got.rows)
    figure = got["Math", "accuracy"]
    (line,) = (line for line in lines if line.startswith("Math"))
    assert line.split()[2] == f"{figure.value:.4f}" and line.split()[-3:] == ["6", "6", str(figure.ties)]
    ax = got.plot(beside={"other": got}, label="this")
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [f"{row.subset}: {row.measure}" for row in got.rows]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["this", "other"]
    got.minus(got).plot()
    with pytest.raises(KeyError):
        got["Math", "speed"]


def test_figures_as_a_dataframe(rm):
    pytest.importorskip("pandas")
    got = evaluation.evaluate(rm, written.rm_bench())
    frame = got.to_dataframe()
    assert list(frame.columns) == ["subset", "measure", "value", "low", "high", "n", "prompts", "ties"]
    assert frame.value.tolist() == [row.value for row in got.rows]


def test_a_random_model_is_right_about_half_the_time(rm):
    rng = random.Random(1)
    rows = [{"prompt": f"p{i}", "chosen": a, "rejected": b} for i in range(200) for a, b in [written.texts(rng, 2)]]
    figure = evaluation.evaluate(rm, rows)["all", "accuracy"]
    assert figure.low < 0.6 and figure.high > 0.4 and figure.n == 200
