"""Best-of-N by rewards of steps: candidates of several rated review snippets, chosen by the steps or by the whole text.

    python -m bench.reproduce.steps REWARD_MODEL VADER.tar.gz

REWARD_MODEL is what `make demo` trains, on the first 400 of the snippets in its order; candidates are made of others.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import rmfast

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import demo_data

GROUPS, CANDIDATES, STEPS, TRAINED = 60, 8, 3, 400
QUESTION = "What do people say of this film?\n"


def main(model: str, ratings: str) -> None:
    rated = demo_data.ratings(Path(ratings))
    rated = [rated[i] for i in np.random.default_rng(0).permutation(len(rated))][TRAINED:]
    rng = np.random.default_rng(1)
    drawn = rng.integers(len(rated), size=(GROUPS, CANDIDATES, STEPS))
    truth = np.array([[[rated[i][0] for i in one] for one in group] for group in drawn])  # (G, N, S), people's
    texts = [[rated[i][1] for i in one] for group in drawn for one in group]
    rm = rmfast.load(model, device="cpu")
    each = [scores.numpy() for scores in rm.step_scores(QUESTION, texts, format="concat")]
    steps = np.stack(each).reshape(truth.shape)
    print(f"rank correlation of a step's score with its rating {spearman(steps, truth):.2f}")
    made = {"min": steps.min(2), "prod": steps.prod(2), "mean": steps.mean(2), "last": steps[..., -1]}
    made["whole text, by score"] = rm.score(
        [(QUESTION, "\n".join(one) + "\n") for one in texts], format="concat"
    ).numpy()
    mean, worst = truth.mean(2), truth.min(2)
    rows = {how: scores.reshape(GROUPS, CANDIDATES).argmax(1) for how, scores in made.items()}
    print("chosen by, mean rating, worst step's rating")
    print(f"chance, {mean.mean():.2f}, {worst.mean():.2f}")
    for how, best in rows.items():
        got = [np.take_along_axis(x, best[:, None], 1)[:, 0] for x in (mean, worst)]
        errors = [x.std() / GROUPS**0.5 for x in got]
        print(f"{how}, {got[0].mean():.2f} ± {errors[0]:.2f}, {got[1].mean():.2f} ± {errors[1]:.2f}")
    print(f"best there is, {mean.max(1).mean():.2f}, {worst.max(1).mean():.2f}")


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a.reshape(-1), b.reshape(-1)).statistic)


if __name__ == "__main__":
    main(*sys.argv[1:])
