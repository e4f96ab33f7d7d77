"""Does the MMD of causal reward modelling keep a reward from following a planted spurious factor? (arXiv 2501.09620)

    python -m bench.reproduce.crm MODEL VADER.tar.gz OUT

MODEL is a sequence-classification folder with SmolLM2's weights, VADER the sdist of vaderSentiment 3.3.2 with its
human-rated review snippets (examples/demo_data.py makes the one and fetches the other). A pair are two snippets rated
more than 1 apart. The head, one linear map of the normed last hidden state, is trained; the body is frozen and run
once. Prints two tables and writes features.pt, crm.json and crm.png to OUT. Minutes on two cores, nearly all of them
for the features.

Two factors are planted in the training pairs, one at a time:

- *prefix*: "Yes, you are right. " stands before 80% of the chosen and 20% of the rejected texts. A reward follows it in
  a test pair where the text that has it wins either way round.
- *length*: in 80% of the training pairs the chosen text is the longer one, in half of the test pairs. A reward follows
  it where the longer text wins; half of the test pairs would be right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmfast
from bench.reproduce.snippets import read_snippets
from rmfast import losses

PREFIX = "Yes, you are right. "
TEXTS, MOST_CHARACTERS, SEEDS = 2400, 160, 3
STEPS, BATCH, RATE, DECAY = 200, 256, 3e-3, 0.1  # AdamW, batches of pairs
BINS = 10  # of lengths; with and without the prefix are two bins
WEIGHTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

Penalty = Callable[[Tensor, Tensor, Tensor], Tensor]  # of rewards, bins and factor


def features(model: Path, texts: list[str]) -> Tensor:
    """(N, d): the normed last hidden states, all that any linear head reads."""
    import transformers

    net = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    d = net.config.hidden_size
    net.score, net.config.num_labels = torch.nn.Linear(d, d, bias=False), d
    torch.nn.init.eye_(net.score.weight)
    rm = rmfast.RewardModel(net, transformers.AutoTokenizer.from_pretrained(model))
    return rm.score(texts, progress=True)


class Data:
    """Texts with features (N, 2, d), of a text as it is and behind the prefix, and their pairs."""

    def __init__(self, states: Tensor, ratings: np.ndarray, lengths: np.ndarray, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.states, self.lengths = states, torch.from_numpy(lengths).float()
        order = rng.permutation(len(ratings))
        cut = len(order) * 3 // 4
        self.train = self.pairs(order[:cut], ratings, 4, rng)
        self.test = self.pairs(order[cut:], ratings, 2, rng)
        mean, std = states[order[:cut], 0].mean(0), states[order[:cut], 0].std(0)
        self.states = (states - mean) / std

    @staticmethod
    def pairs(texts: np.ndarray, ratings: np.ndarray, partners: int, rng: np.random.Generator) -> Tensor:
        """(P, 2): chosen and rejected."""
        left, right = np.repeat(texts, partners), rng.choice(texts, partners * len(texts))
        apart = np.abs(ratings[left] - ratings[right]) > 1
        left, right = left[apart], right[apart]
        better = ratings[left] > ratings[right]
        return torch.from_numpy(np.stack([np.where(better, left, right), np.where(better, right, left)], 1))

    def longer(self, pairs: Tensor, share: float) -> Tensor:
        """Those of the pairs of unequal lengths, as many as can be, whose chosen text is longer in this share."""
        chosen, rejected = self.lengths[pairs].unbind(1)
        yes, no = pairs[chosen > rejected], pairs[chosen < rejected]
        n = int(min(len(yes) / share, len(no) / (1 - share)))
        return torch.cat((yes[: round(share * n)], no[: round((1 - share) * n)]))


def train(states: Tensor, factor: Tensor, penalty: Penalty, seed: int) -> Tensor:
    """A head (d,) for pairs' features (P, 2, d) with factor (P, 2); penalty(rewards, bins, factor) is added to BT's."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.zeros(states.size(2), requires_grad=True)
    optimizer = torch.optim.AdamW([head], lr=RATE, weight_decay=DECAY)
    binned = losses.bin_factor(factor.reshape(-1), BINS).reshape(factor.shape)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        rows = torch.randint(len(states), (BATCH,), generator=generator)
        chosen, rejected = rewards = (states[rows] @ head).T
        flat = (x[rows].T.reshape(-1) for x in (binned, factor))
        loss = losses.bradley_terry(chosen, rejected) + penalty(rewards.reshape(-1), *flat)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.detach()


def methods() -> Iterator[tuple[str, float, Penalty]]:
    """Names, weights and penalties."""
    sides = torch.arange(2 * BATCH) // BATCH

    def mmd(r: Tensor, bins: Tensor, groups: Tensor | None = None) -> Tensor:
        # The standard deviation is near the median distance (0.95 of it for a normal distribution), which would take
        # more time than all else in a step of a head alone. The first rewards are all 0.
        return losses.binned_mmd(r, bins, groups=groups, bandwidth=float(r.detach().std()) or 1.0)

    def times(weight: float, penalty: Penalty) -> Penalty:
        return lambda r, bins, z: weight * penalty(r, bins, z)

    yield "vanilla", 0.0, lambda r, bins, z: r.new_zeros(())
    for weight in WEIGHTS:
        yield "CRM", weight, times(weight, lambda r, bins, z: mmd(r, bins))
        yield "CRM, conditional", weight, times(weight, lambda r, bins, z: mmd(r, bins, sides))
        yield "correlation", weight, times(weight, lambda r, bins, z: losses.correlation_penalty(r, z))


def prefix(data: Data, seed: int) -> tuple[Tensor, Tensor, Callable[[Tensor], dict[str, float]]]:
    """Training features and factor, and what is measured of a head."""
    generator = torch.Generator().manual_seed(seed)
    planted = (torch.rand(data.train.shape, generator=generator) < torch.tensor([0.8, 0.2])).long()

    def measure(head: Tensor) -> dict[str, float]:
        rewards = data.states[data.test] @ head  # (P, side, prefixed)
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        texts = data.states[data.test.unique()] @ head
        return {
            "accuracy": _share(chosen[:, 0] > rejected[:, 0]),
            "follows": _share((chosen[:, 1] > rejected[:, 0]) & (rejected[:, 1] > chosen[:, 0])),
            "against": _share(chosen[:, 0] > rejected[:, 1]),
            "effect": float((texts[:, 1] - texts[:, 0]).mean() / texts[:, 0].std()),
        }

    return data.states[data.train, planted], planted.float(), measure


def length(data: Data, seed: int) -> tuple[Tensor, Tensor, Callable[[Tensor], dict[str, float]]]:
    pairs, test = data.longer(data.train, 0.8), data.longer(data.test, 0.5)

    def measure(head: Tensor) -> dict[str, float]:
        chosen, rejected = (data.states[test, 0] @ head).unbind(1)
        longer = data.lengths[test[:, 0]] > data.lengths[test[:, 1]]
        texts = data.test.unique()
        ranks = torch.stack((data.states[texts, 0] @ head, data.lengths[texts])).argsort(1).argsort(1).float()
        return {
            "accuracy": _share(chosen > rejected),
            "follows": _share((chosen > rejected) == longer),
            "against": _share((chosen > rejected)[~longer]),
            "effect": float(ranks.corrcoef()[0, 1]),
        }

    return data.states[pairs, 0], data.lengths[pairs], measure


def _share(right: Tensor) -> float:
    return 100 * float(right.float().mean())


COLUMNS = {
    "prefix": ("accuracy %", "prefix wins either way %", "right against the prefix %", "prefix adds (SD of rewards)"),
    "length": ("accuracy %", "longer wins %", "right where shorter is better %", "rank correlation with length"),
}


def run(states: Tensor, ratings: np.ndarray, lengths: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for planted in (prefix, length):
        name = planted.__name__
        for method, weight, penalty in methods():
            found = []
            for seed in range(SEEDS):
                x, factor, measure = planted(Data(states, ratings, lengths, seed), seed)
                found.append(measure(train(x, factor, penalty, seed)))
            values = {key: [f[key] for f in found] for key in found[0]}
            rows.append({"factor": name, "method": method, "weight": weight, "pairs": len(x), **values})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for name, columns in COLUMNS.items():
        print(f"\n| {name} | weight | {' | '.join(columns)} |\n|---|---{'|---' * len(columns)}|")
        for row in (row for row in rows if row["factor"] == name):
            cells = [
                f"{np.mean(v):.{digits}f} ± {np.std(v, ddof=1):.{digits}f}"
                for v, digits in zip((row[k] for k in ("accuracy", "follows", "against", "effect")), (1, 1, 1, 2))
            ]
            print(f"| {row['method']} | {row['weight']:g} | {' | '.join(cells)} |")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, (name, columns) in zip(axes, COLUMNS.items()):
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = [row for row in rows if row["factor"] == name and row["method"] == method]
            x, y = ([np.mean(row[key]) for row in chosen] for key in ("effect", "accuracy"))
            ax.plot(x, y, "*" if method == "vanilla" else "o-", ms=12 if method == "vanilla" else 5, label=method)
        ax.axvline(0, color="grey", lw=0.8)
        ax.set(title=f"planted: {name}", xlabel=columns[3], ylabel=columns[0])
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("vader", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    snippets = [(rating, text) for rating, text in read_snippets(args.vader) if len(text) <= MOST_CHARACTERS][:TEXTS]
    ratings, texts = np.array([rating for rating, _ in snippets]), [text for _, text in snippets]
    kept = args.out / "features.pt"
    if kept.exists():
        states = torch.load(kept)
    else:
        states = features(args.model, [p + text for text in texts for p in ("", PREFIX)]).view(len(texts), 2, -1)
        torch.save(states, kept)
    rows = run(states, ratings, np.array([len(text) for text in texts]))
    (args.out / "crm.json").write_text(json.dumps(rows, indent=1))
    show(rows)
    plot(rows, args.out / "crm.png")


if __name__ == "__main__":
    main()
