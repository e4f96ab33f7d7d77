"""`rmfast probe`: it writes and prints what `probes.run` gives; against an intervention; files that are there."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import written
from shell import run, saved

import rmfast
from rmfast import probes

SOME = "bold,exclamation,thanks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe")
    saved(path / "model", max_position_embeddings=512)
    rows = [{**row, "chosen": row["chosen"] + ".", "rejected": row["rejected"] + "."} for row in written.pairs(40)]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    neurons = {"model.layers.0.mlp.up_proj": (torch.tensor([1, 2]), torch.zeros(2))}
    rmfast.NeuronClamp(neurons).save(path / "clamp")
    return path


def probed(folder, out, *more):
    given = ["--model", folder / "model", "--pairs", folder / "pairs.jsonl", "--output", out, "--probes", SOME]
    return run("probe", *given, *more)


def test_it_writes_what_the_suite_finds(folder, tmp_path):
    result = probed(folder, tmp_path / "out")
    assert result.exit_code == 0, result.output
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    want = probes.run(rmfast.load(folder / "model", device="cpu"), pairs, probes=SOME.split(","))
    kept = json.loads((tmp_path / "out" / "probes.json").read_text())
    assert [effect["mean"] for effect in kept["effects"]] == [effect.mean for effect in want.effects]
    assert str(want) in result.output
    rows = list(csv.DictReader((tmp_path / "out" / "probes.csv").open()))
    assert [(row["result"], row["probe"]) for row in rows] == [("model", name) for name in SOME.split(",")]
    assert (tmp_path / "out" / "probes.png").stat().st_size > 1000


def test_against_an_intervention(folder, tmp_path):
    result = probed(folder, tmp_path / "out", "--against", folder / "clamp")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "out" / "probes.csv").open()))
    assert {row["result"] for row in rows} == {"model", f"against {folder / 'clamp'}", "difference, in spreads"}


def test_what_is_there_is_kept_and_wrong_names_are_refused(folder, tmp_path):
    (tmp_path / "probes.json").write_text("{}")
    result = probed(folder, tmp_path)
    assert result.exit_code == 1 and "--overwrite" in result.output
    assert (tmp_path / "probes.json").read_text() == "{}"
    result = probed(folder, tmp_path / "other", "--probes", "bald")
    assert result.exit_code == 1 and "'bald'" in result.output
