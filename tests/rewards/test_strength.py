"""The strength of preferences over an ensemble, and `rmfast strength`, whose margins a trainer takes."""

from __future__ import annotations

import sys
from pathlib import Path

import models as M
import pytest
import torch

import rmfast

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from shell import files, read, run

PAIRS = [("p", "good", "bad"), ("q", "yes, it is", "no"), ("r", "a", "b, c"), ("s", "one", "two")]
ROWS = [{"id": i, "prompt": p, "chosen": c, "rejected": r} for i, (p, c, r) in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = []
    for seed in range(3):
        made.append(tmp_path_factory.mktemp(f"m{seed}"))
        M.decoder(seed=seed).save_pretrained(made[-1])
        M.tokenizer(chat=True).save_pretrained(made[-1])
    return made


def loaded(folders):
    return [rmfast.load(folder, device="cpu") for folder in folders]


def margins(rms):
    found = [rm.score([(p, s) for p, c, r in PAIRS for s in (c, r)]) for rm in rms]
    return torch.stack([x[::2].double() - x[1::2].double() for x in found])


def test_mean_and_spread_of_the_margins(folders):
    rms = loaded(folders)
    want = margins(rms)
    got = rmfast.strength(rmfast.Ensemble(rms), PAIRS)
    torch.testing.assert_close(got.margins, want.float())
    torch.testing.assert_close(got.mean, want.mean(0).float())
    torch.testing.assert_close(got.std, want.std(0, correction=0).float())
    assert torch.equal(rmfast.strength(rmfast.Ensemble(rms), ROWS).mean, got.mean)
    one = rmfast.strength(rmfast.Ensemble(rms), PAIRS[1:2])
    assert torch.equal(one.mean, got.mean[1:2])
    with pytest.raises(ValueError, match="at least two members"):
        rmfast.strength(rmfast.Ensemble(rms[:1]), PAIRS)


def command(folders, tmp_path, rows, *more):
    members = [each for folder in folders[1:] for each in ("--member", folder)]
    return ["strength", *files(folders[0], tmp_path, rows), *members, *more]


def test_the_command_writes_margins_and_goes_on(folders, tmp_path):
    args = command(folders, tmp_path, ROWS, "--window", 1)
    done = run(*args)
    assert done.exit_code == 0, done.output
    want = rmfast.strength(rmfast.Ensemble(loaded(folders)), PAIRS)
    got = read(tmp_path / "out.jsonl")
    assert [row["margin"] for row in got] == pytest.approx(want.mean.tolist(), rel=1e-5, abs=1e-6)
    assert [row["margin_std"] for row in got] == pytest.approx(want.std.tolist(), rel=1e-5, abs=1e-6)
    assert [{key: row[key] for key in ROWS[0]} for row in got] == ROWS
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(whole[:-20])
    log = tmp_path / "out.jsonl.run.jsonl"
    log.write_bytes(b"\n".join(log.read_bytes().split(b"\n")[:-2]) + b"\n")
    assert run(*args).exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    other = run(*command(folders[:2], tmp_path, ROWS))
    assert other.exit_code == 1 and "members" in other.stderr


def test_pairs_that_the_models_think_wrong_are_flipped(folders, tmp_path):
    assert run(*command(folders, tmp_path, ROWS, "--flip")).exit_code == 0
    mean = rmfast.strength(rmfast.Ensemble(loaded(folders)), PAIRS).mean
    assert (mean < 0).any() and (mean > 0).any()
    for row, was, margin in zip(read(tmp_path / "out.jsonl"), ROWS, mean.tolist()):
        assert row["flipped"] == (margin < 0) and row["margin"] == pytest.approx(abs(margin), rel=1e-5)
        sides = (was["rejected"], was["chosen"]) if margin < 0 else (was["chosen"], was["rejected"])
        assert (row["chosen"], row["rejected"]) == sides


def test_the_margins_are_taken_by_the_trainer(folders, tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset

    from rmfast.integrations.trl import RewardConfig, RewardTrainer

    assert run(*command(folders, tmp_path, ROWS, "--flip")).exit_code == 0
    rows = [
        {key: row[key] for key in ("prompt", "chosen", "rejected", "margin")} for row in read(tmp_path / "out.jsonl")
    ]
    args = RewardConfig(
        output_dir=str(tmp_path / "t"), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    trainer = RewardTrainer(
        model=M.decoder(), args=args, train_dataset=Dataset.from_list(rows), processing_class=M.tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["margin"].tolist()) == pytest.approx(sorted(row["margin"] for row in rows))


@pytest.mark.parametrize("rows, word", [([{"text": "a"}], "chosen and rejected"), ([{"chosen": "a"}], "chosen")])
def test_rows_that_are_no_pairs_are_refused(folders, tmp_path, rows, word):
    done = run(*command(folders, tmp_path, rows))
    assert done.exit_code == 1 and word in done.stderr


def test_members_of_another_tokenizer_are_refused(folders, tmp_path):
    other = tmp_path / "other"
    M.decoder().save_pretrained(other)
    M.tokenizer().save_pretrained(other)  # without the template
    done = run(*command([folders[0], other], tmp_path, ROWS))
    assert done.exit_code == 1 and "tokenizer" in done.stderr
