"""Do clamped neurons take length and other biases out of a reward model, beside simpler corrections? (arXiv 2604.27495)

    python -m bench.reproduce.cirm MODEL OUT --reviews VADER.tar.gz --hh HH.jsonl.gz

MODEL is a sequence-classification folder with SmolLM2's weights, VADER the sdist of vaderSentiment 3.3.2 with its
human-rated review snippets (examples/demo_data.py makes the one and fetches the other); HH a file of HH-RLHF pairs
(chosen, rejected: dialogues that part in the assistant's last turn). For each data set given a linear head on the
normed last hidden state is trained, the interventions are fitted on 500 other pairs, and reported on pairs that nothing
was fitted on. Prints a table and writes cirm-NAME.json and a plot for each to OUT. Minutes on two cores.

- *reviews*: a pair are two snippets rated more than 1 apart. A length bias is planted: in 90% of the training pairs the
  chosen text is the longer one. The other pairs are as they come.
- *hh*: pairs of texts of at most 800 characters, as they come.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

import rmfast
from bench.reproduce.crm import features
from bench.reproduce.snippets import read_snippets
from rmfast import debias
from rmfast.interventions import LWR, DirectionRemoval, LengthPenalty, NeuronClamp
from rmfast.texts.pairs import read_pairs

FIT, PARTNERS, PLANTED = 500, 20, 0.9
L2 = 0.1  # on unit-variance features


@dataclass(frozen=True)
class Data:
    """Texts that the head is trained on, their pairs (P, 2) of chosen and rejected, and pairs to fit and to test on."""

    name: str
    texts: list[Any]
    pairs: np.ndarray
    fit: list[Any]
    test: list[Any]
    attributes: list[str]


def reviews(sdist: Path, train: int = 1000, test: int = 700, planted: bool = True) -> Data:
    rng, rated = np.random.default_rng(0), read_snippets(sdist)
    ratings, texts = np.array([rating for rating, _ in rated]), [text for _, text in rated]
    lengths = np.array([len(text) for text in texts])
    left, right = np.repeat(np.arange(train), PARTNERS), rng.integers(0, train, train * PARTNERS)
    left, right = (side[abs(ratings[left] - ratings[right]) > 1] for side in (left, right))
    pairs = np.stack([left, right], 1)
    pairs = np.where((ratings[left] > ratings[right])[:, None], pairs, pairs[:, ::-1])
    gap = np.diff(lengths[pairs][:, ::-1])[:, 0]
    shorter = pairs[gap < 0]
    longer = pairs[gap > 0]
    if planted:
        shorter = shorter[: round(len(longer) * (1 - PLANTED) / PLANTED)]
    rest = [
        {"chosen": a, "rejected": b} if x > y else {"chosen": b, "rejected": a}
        for (x, a), (y, b) in zip(rated[train::2], rated[train + 1 :: 2])
        if abs(x - y) > 1
    ]
    names = ["length", "exclamation"]  # a sentence has no paragraphs, and no prompt to overlap with
    name = "reviews" if planted else "reviews, natural"
    pairs = np.concatenate([longer, shorter])
    return Data(name, texts[:train], pairs, rest[:FIT], rest[FIT:][:test], names)


def hh(path: Path, train: int = 500, test: int = 400, most: int = 800) -> Data:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = []
    for row in rows:
        (before, chosen), (other, rejected) = (dialogue(row[side]) for side in ("chosen", "rejected"))
        if before == other and chosen.strip() and rejected.strip() and max(map(len, row.values())) <= most:
            found.append((before, chosen, rejected))
    found = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    texts = [text for pair in read_pairs(found[:train]) for text in pair.inputs]
    names = ["length", "overlap", "exclamation", "paragraphs"]  # bold is in 1 of 1,000 texts
    pairs = np.arange(2 * train).reshape(-1, 2)
    return Data("hh", texts, pairs, found[train : train + FIT], found[train + FIT :][:test], names)


def dialogue(text: str) -> tuple[list[dict[str, str]], str]:
    """The turns before the assistant's last, and that one."""
    before, _, last = text.rpartition("\n\nAssistant:")
    turns = before.replace("\n\nAssistant:", "\n\nHuman:").split("\n\nHuman:")[1:]
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)], last.strip()


def head(states: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """(d,): maximises the pairs' Bradley-Terry likelihood over states (N, d), less L2 on unit-variance features."""
    spread = states.std(axis=0)
    difference = (states[pairs[:, 0]] - states[pairs[:, 1]]) / spread

    def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
        margin = difference @ weight
        gradient = -difference.T @ (1 / (1 + np.exp(margin))) / len(margin)
        return np.logaddexp(0, -margin).mean() + L2 / 2 * weight @ weight, gradient + L2 * weight

    return minimize(loss, np.zeros(states.shape[1]), jac=True, method="L-BFGS-B").x / spread


def model_with(folder: Path, weight: np.ndarray) -> rmfast.RewardModel:
    import transformers

    net = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    net.score = torch.nn.Linear(len(weight), 1, bias=False)
    net.config.num_labels = 1
    with torch.no_grad():
        net.score.weight.copy_(torch.from_numpy(weight)[None])
    return rmfast.RewardModel(net, transformers.AutoTokenizer.from_pretrained(folder))


def directions(states: np.ndarray, found: debias.Attributes, fingerprint: str) -> DirectionRemoval:
    """For each attribute the mean normed state of the texts above its median, less that of the others."""
    removed = []
    for name in found.names:
        column = found[name]
        more = column > min(np.median(column), np.unique(column)[-2])
        removed.append(states[more].mean(0) - states[~more].mean(0))
    return DirectionRemoval(torch.from_numpy(np.stack(removed)), 1.0, "after", fingerprint)


def scored(rm: rmfast.RewardModel, pairs: Sequence[Any], interventions: list[Any]) -> np.ndarray:
    """(V, n, 2) rewards of chosen and rejected."""
    texts = [text for pair in read_pairs(pairs) for text in pair.inputs]
    return rm.score(texts, interventions=interventions).double().numpy().reshape(len(interventions), -1, 2)


def gained(rewards: np.ndarray, before: np.ndarray, resamples: int = 2000) -> list[float]:
    """The change in accuracy, paired, with the 95% interval of a bootstrap over the pairs."""
    change = np.sign(rewards[:, 0] - rewards[:, 1]) / 2 - np.sign(before[:, 0] - before[:, 1]) / 2
    drawn = np.random.default_rng(0).choice(change, (resamples, len(change))).mean(1)
    return [float(change.mean()), *map(float, np.quantile(drawn, [0.025, 0.975]))]


def reproduce(data: Data, model: Path, output: Path, trials: int) -> dict[str, Any]:
    start = time.perf_counter()
    states = features(model, data.texts).double().numpy()
    rm = model_with(model, head(states, data.pairs))
    fitting = [(pair.prompt, text) for pair in read_pairs(data.fit) for text in (pair.chosen, pair.rejected)]
    found = debias.attributes(*zip(*fitting))
    some = debias.Attributes(tuple(data.attributes), np.stack([found[name] for name in data.attributes], 1))

    clamp = debias.fit(rm, data.fit, attributes=data.attributes, trials=trials, progress=True)
    states = features(model, [text for pair in read_pairs(data.fit) for text in pair.inputs]).double().numpy()
    rewards = states @ rm.model.score.weight.detach().double().numpy()[0]  # type: ignore[operator, union-attr]
    removal = directions(states, some, rm.fingerprint)
    variants: dict[str, Any] = {
        "none": None,
        "length penalty": LengthPenalty(0.001),
        "LWR": LWR.fit(some["length"].astype(int).tolist(), rewards, frac=0.5),
        "directions": removal,
        "CIRM": clamp,
        "CIRM + directions": clamp + removal,
        "CIRM, all positions": NeuronClamp(clamp.neurons, "all", clamp.fingerprint),
    }
    tested = dict(zip(variants, scored(rm, data.test, list(variants.values()))))
    reports = {
        name: debias.report(None, data.test, rewards=r, attributes=data.attributes) for name, r in tested.items()
    }
    gains = {name: gained(r, tested["none"]) for name, r in tested.items()}
    print(f"\n{data.name}: head from {len(data.pairs)} pairs, {FIT} to fit, {len(data.test)} to test; rewards' spread "
          f"{tested['none'].std():.2f}; neurons clamped {len(clamp)}, k {clamp.metadata['k']}")  # fmt: skip
    print(json.dumps(clamp.metadata["seconds"]))
    print(table(reports, gains))
    draw(reports, output / f"cirm-{data.name}.png")
    return {
        "pairs": {"head": len(data.pairs), "fit": len(data.fit), "test": len(data.test)},
        "clamp": dict(clamp.metadata),
        "seconds": time.perf_counter() - start,
        "reward_std": float(tested["none"].std()),
        "accuracy_gain": gains,
        "report": {name: [row._asdict() for row in report.rows] for name, report in reports.items()},
    }


def table(reports: dict[str, debias.Report], gains: dict[str, list[float]]) -> str:
    """Markdown: the paper's accuracies by length, their change, and sensitivities, each with its 95% interval."""
    first = next(iter(reports.values()))
    counts = [first["length", m].n for m in ("accuracy_more", "accuracy_less")]
    names = [f"chosen longer (n {counts[0]})", f"chosen shorter (n {counts[1]})", f"all (n {first['accuracy'].n})"]
    lines = [["", *names, "change of all", *(f"Spearman, {name}" for name in first.attributes)]]
    for name, report in reports.items():
        rows = [report["length", "accuracy_more"], report["length", "accuracy_less"], report["accuracy"]]
        cells = [f"{100 * r.value:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]" for r in rows]
        cells.append("" if name == "none" else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in gains[name])))
        for attribute in report.attributes:
            row = report[attribute, "spearman"]
            cells.append(f"{row.value:+.2f} [{row.low:+.2f}, {row.high:+.2f}]")
        lines.append([name, *cells])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(reports: dict[str, debias.Report], path: Path) -> None:
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    axes = debias.plot(reports)
    axes[0].figure.savefig(path, dpi=150)
    pyplot.close("all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--reviews", type=Path)
    parser.add_argument("--hh", type=Path)
    parser.add_argument("--trials", type=int, default=100)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for make, path in ((reviews, args.reviews), (hh, args.hh)):
        if path is not None:
            data = make(path)
            result = reproduce(data, args.model, args.output, args.trials)
            (args.output / f"cirm-{data.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
