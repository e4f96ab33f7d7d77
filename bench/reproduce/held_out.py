"""What CIRM gains on pairs that it was not fitted on, beside as many random neurons, with biases planted and natural.

    python -m bench.reproduce.held_out MODEL OUT --reviews VADER.tar.gz --hh HH.jsonl.gz

MODEL, VADER and HH as for bench.reproduce.cirm, whose heads these are. For each data set a clamp is found on 500
pairs, k by nested cross-validation (`debias.validate`); what that says the clamp gains stands beside what it gains on
all pairs that are left, with the gain of each choice of k, which nobody knows beforehand. Prints tables, writes
held-out-NAME.json to OUT. Some 6 minutes of one core for each.

- *reviews, planted*: in 90% of the head's training pairs the chosen snippet is the longer one.
- *reviews, natural*: the same snippets, training pairs as they come.
- *hh*: dialogues as they come.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import rmfast
from bench.reproduce.cirm import Data, head, hh, model_with, reviews
from bench.reproduce.crm import features
from rmfast import debias
from rmfast.debias.gain import gains, over_random
from rmfast.debias.measure import attributes_of_pairs, figure, right
from rmfast.debias.study import prompts_of
from rmfast.last_token import LastTokenRuns
from rmfast.texts.pairs import read_pairs

AT_ONCE = 200  # pairs of which keys and values are held
CONTROLS, CONFIDENCE = 5, 0.95
ATTRIBUTES = ("length", "overlap")  # the others are in few of these texts


def judged(rm: rmfast.RewardModel, pairs: Sequence[Any], clamps: Sequence[rmfast.NeuronClamp]) -> np.ndarray:
    """(1 + clamps, n, 2) rewards, without a clamp and with each."""
    every = []
    for start in range(0, len(pairs), AT_ONCE):
        texts = [text for pair in read_pairs(pairs[start : start + AT_ONCE]) for text in pair.inputs]
        runs = LastTokenRuns(rm, texts)
        every.append([runs.rewards(clamp).double().numpy().reshape(-1, 2) for clamp in (None, *clamps)])
    return np.concatenate(every, axis=1)


def reproduce(data: Data, model: Path, folds: int, trials: int) -> dict[str, Any]:
    start = time.perf_counter()
    rm = model_with(model, head(features(model, data.texts).double().numpy(), data.pairs))
    found = debias.validate(
        rm, data.fit, attributes=data.attributes, folds=folds, trials=trials, controls=CONTROLS, confidence=CONFIDENCE
    )
    print(f"\n{data.name}: nested cross-validation on {len(data.fit)} pairs\n{found}")

    neurons = found.neurons
    ks = {rule: each[-1] for rule, each in found.chosen.items()}
    chosen = [neurons.clamp(each) for each in ks.values()]
    # Where a rule takes no neuron, the control and the costs are those of the other's clamp.
    own = next((clamp for clamp in (found.clamp, *chosen) if len(clamp)), found.clamp)
    randoms = [neurons.random(own, draw) for draw in range(CONTROLS)]
    curve = [neurons.clamp(dict.fromkeys(data.attributes, share)) for share in debias.SHARES]
    rewards = judged(rm, data.test, [*chosen, own, *randoms, *curve])
    before, after = rewards[0], dict(zip(ks, rewards[1:]))
    costs, drawn, at = (rewards[1 + len(ks)], rewards[2 + len(ks) : 2 + len(ks) + CONTROLS], rewards[-len(curve) :])
    read = read_pairs(data.test)
    attributes, of = attributes_of_pairs(read, data.attributes), prompts_of(read)
    kw: dict[str, Any] = {"found": attributes, "of": of, "confidence": CONFIDENCE}
    rows = [*gains(before, costs, **kw), *over_random(before, costs, list(drawn), of, CONFIDENCE)]
    by_rule = {rule: gains(before, each, **kw)[0] for rule, each in after.items()}
    by_share = {share: gains(before, each, **kw)[0] for share, each in zip(debias.SHARES, at)}
    reports = {
        name: debias.report(None, data.test, rewards=each, attributes=data.attributes)
        for name, each in (("before", before), ("after", costs))
    }
    print(f"on {len(data.test)} other pairs, accuracy {right(before).mean():.3f} without a clamp")
    for rule, row in by_rule.items():
        print(f"  k by {rule}: {figure(row, '+.3f')}  {len(neurons.clamp(ks[rule]))} neurons, k {ks[rule]}")
    for share, row in by_share.items():
        print(f"  a share of {share:.2%} for each attribute: {figure(row, '+.3f')}")
    for each in rows:
        print(f"  {each.attribute or 'all pairs'} {each.measure}: {figure(each, '+.3f')}  n {each.n}")
    for name, report in reports.items():
        print(f"{name}: {report}")
    return {
        "pairs": {"head": len(data.pairs), "fit": len(data.fit), "test": len(data.test)},
        "nested": {
            "rows": [row._asdict() for row in found.rows],
            "rules": {rule: row._asdict() for rule, row in found.rules.items()},
            "k": found.chosen,
            "curve": [{"k": k, "neurons": count, "accuracy": accuracy} for k, count, accuracy in found.curve],
            "seconds": found.clamp.metadata["seconds"],
        },
        "test": {
            "accuracy": float(right(before).mean()),
            "neurons": {"judged": len(own), "all": len(neurons)},
            "rules": {rule: row._asdict() for rule, row in by_rule.items()},
            "shares": {share: row._asdict() for share, row in by_share.items()},
            "rows": [row._asdict() for row in rows],
            "reports": {name: [row._asdict() for row in report.rows] for name, report in reports.items()},
        },
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--reviews", type=Path)
    parser.add_argument("--hh", type=Path)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--test", type=int, default=2000, help="pairs at most")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    made: dict[str, Callable[[], Data]] = {}
    if args.reviews is not None:
        made["reviews-planted"] = lambda: reviews(args.reviews, test=args.test)
        made["reviews-natural"] = lambda: reviews(args.reviews, test=args.test, planted=False)
    if args.hh is not None:
        made["hh"] = lambda: hh(args.hh, test=args.test)
    for name, make in made.items():
        data = make()
        data = replace(data, attributes=[each for each in data.attributes if each in ATTRIBUTES])
        result = reproduce(data, args.model, args.folds, args.trials)
        (args.output / f"held-out-{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
