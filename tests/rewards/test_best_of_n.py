"""The script behind docs/steps.md chooses by the steps as `score` of the texts would."""

from __future__ import annotations

import models as M
import numpy as np

import rmfast
from bench.reproduce import steps


def test_best_of_n_chooses_by_the_rewards_at_the_steps_ends(tmp_path, monkeypatch, capsys):
    M.decoder(max_position_embeddings=256).save_pretrained(tmp_path)
    M.tokenizer("plain").save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    rated = [(float(rng.integers(-4, 5)), f"a film, {i}") for i in range(460)]
    monkeypatch.setattr(steps.demo_data, "ratings", lambda path: rated)
    monkeypatch.setattr(steps, "GROUPS", 4)
    steps.main(str(tmp_path), "ratings")
    lines = capsys.readouterr().out.splitlines()
    found = {line.split(", ")[0]: line.split(", ")[-2:] for line in lines[2:]}
    assert set(found) == {"chance", "min", "prod", "mean", "last", "whole text", "best there is"}
    assert found["last"] == found["whole text"]  # the last step ends where the text does
    # By hand: the candidate whose least reward at a newline is the largest.
    rated = [rated[i] for i in np.random.default_rng(0).permutation(len(rated))][steps.TRAINED :]
    drawn = np.random.default_rng(1).integers(len(rated), size=(4, steps.CANDIDATES, steps.STEPS))
    rm, got = rmfast.load(tmp_path, device="cpu"), []
    for group in drawn:
        least = []
        for one in group:
            ends = ["".join(rated[i][1] + "\n" for i in one[: n + 1]) for n in range(steps.STEPS)]
            least.append(min(rm.score([steps.QUESTION + end for end in ends]).tolist()))
        got.append(np.mean([rated[i][0] for i in group[int(np.argmax(least))]]))
    assert found["min"][0].startswith(f"{np.mean(got):.2f}")
