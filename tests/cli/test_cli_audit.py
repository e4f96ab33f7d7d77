"""`rmfast audit`: pairs in; a page and its data out; runs that go on, samples, bad rows."""

from __future__ import annotations

import json

import models
import pytest
import written
from shell import run, write

import rmfast
from rmfast import evaluation
from rmfast.audit import Audit

for _library in ("altair", "vl_convert", "optuna"):
    pytest.importorskip(_library)
FEW = ["--show", 2, "--sweep-pairs", 1, "--trials", 2, "--parity", 4, "--resamples", 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    models.decoder().save_pretrained(path)
    models.tokenizer(chat=True).save_pretrained(path)
    return path


def audited(folder, tmp_path, rows, *more, name="pairs.jsonl"):
    write(tmp_path / name, rows)
    return run("audit", "--model", folder, "--pairs", tmp_path / name, "--output", tmp_path / "out", *FEW, *more)


def test_a_page_and_its_data_are_written_and_made_again_without_a_model(folder, tmp_path, monkeypatch):
    rows = written.pairs(40)
    done = audited(folder, tmp_path, rows)
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    found = evaluation.evaluate(rmfast.load(folder), rows, layout="pairs", resamples=50)
    assert str(found) in done.stdout and f"{out / 'index.html'}: 1.0 MB" in done.stdout
    audit = Audit.load(out / "audit.json")
    assert (audit.model, audit.pairs, audit.missing) == ("tiny", 40, {})
    page = (out / "index.html").read_text()
    assert page.startswith("<!doctype html>") and "Audit of tiny" in page
    facts = dict(audit.facts["run"])
    assert facts["command"].startswith("rmfast") and len(facts["SHA-256 of the pairs"]) == 64
    monkeypatch.setattr(rmfast, "load", None)
    (out / "index.html").unlink()
    again = audited(folder, tmp_path, rows)
    assert again.exit_code == 0, again.output
    assert again.stdout == done.stdout and (out / "index.html").read_text() == page


def test_a_stopped_audit_goes_on(folder, tmp_path, monkeypatch):
    from rmfast.audit import biases

    def killed(*args, **kw):
        raise KeyboardInterrupt

    monkeypatch.setattr(biases, "with_clamp", killed)
    stopped = audited(folder, tmp_path, written.pairs(40))
    assert stopped.exit_code == 130 and not (tmp_path / "out" / "index.html").exists()
    monkeypatch.undo()
    done = audited(folder, tmp_path, written.pairs(40))
    assert done.exit_code == 0, done.output
    made = [line for line in done.stderr.splitlines() if line.startswith("rmfast: section ")]
    assert "rmfast: section biases" in made and "rmfast: section lens" not in made


def test_another_revision_of_a_model_on_the_hub_is_not_mixed_in(folder, tmp_path, monkeypatch):
    from rmfast.cli import audit as command
    from rmfast.cli.options import load_model

    commit = "a"

    def load(options):
        model = load_model(options)
        model.model.config._commit_hash = commit
        return model

    monkeypatch.setattr(command, "load_model", load)
    rows = written.pairs(12)
    done = audited(folder, tmp_path, rows, "--no-debias")
    assert done.exit_code == 0, done.output
    (tmp_path / "out" / "sections" / "parity.json").unlink()
    commit = "b"
    mixed = audited(folder, tmp_path, rows, "--no-debias")
    assert mixed.exit_code == 1 and "model_revision 'a' and now it is 'b'" in mixed.stderr
    done = audited(folder, tmp_path, rows, "--no-debias", "--overwrite")
    assert done.exit_code == 0, done.output
    said = {line.removeprefix("rmfast: section ") for line in done.stderr.splitlines() if "rmfast: section " in line}
    assert {"facts", "tokens", "lens", "parity"} <= said and "made" not in said


def test_an_audit_is_of_all_pairs_under_a_launcher_and_names_may_be_long(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = [{**row, "subset": "s" * 100_000 + str(i % 2)} for i, row in enumerate(written.pairs(12))]
    done = audited(folder, tmp_path, rows, "--no-debias", "--sweep-pairs", 0)
    assert done.exit_code == 0, done.output
    assert Audit.load(tmp_path / "out" / "audit.json").pairs == 12
    page = (tmp_path / "out" / "index.html").read_text()
    assert len(page) < 1.5e6 and "s" * 117 + "..." in page and "s" * 121 not in page


def test_a_sample_of_any_kind_of_file(folder, tmp_path):
    rows = written.pairs(30)
    done = audited(folder, tmp_path, rows, "--sample", 20, "--no-debias", name="pairs.csv")
    assert done.exit_code == 0, done.output
    some = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    assert len(some) == 20 and all(row in rows for row in some)
    assert Audit.load(tmp_path / "out" / "audit.json").pairs == 20


def test_bad_rows_stop_the_run_or_are_left_out(folder, tmp_path):
    rows = written.pairs(30)
    rows[3]["chosen"] = ""
    stopped = audited(folder, tmp_path, rows, "--no-debias")
    assert stopped.exit_code == 1 and "line 4" in stopped.stderr
    done = audited(folder, tmp_path, rows, "--no-debias", "--on-error", "null")
    assert done.exit_code == 0, done.output
    audit = Audit.load(tmp_path / "out" / "audit.json")
    assert (audit.pairs, audit.left_out) == (29, 1) and 3 not in [pair["place"] for pair in audit.shown]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"text": "a"}] * 2, [], "chosen"),
        (written.pairs(4), ["--confidence", "2"], "--confidence to be in (0, 1)"),
        (written.rewardbench2(2, 0), [], "chosen"),
        (written.pairs(1), [], "at least 2 pairs in pairs.jsonl"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(folder, tmp_path, rows, more, message):
    done = audited(folder, tmp_path, rows, *more)
    assert done.exit_code == 1
    assert message in done.stderr.splitlines()[-1]


def test_a_missing_library_is_named_before_anything_runs(folder, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "altair", None)
    done = audited(folder, tmp_path, written.pairs(4))
    assert done.exit_code == 1 and 'pip install "rmfast[audit]"' in done.stderr
    assert not (tmp_path / "out").exists()
