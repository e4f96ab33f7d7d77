"""Does linear attribution predict what patching does to a reward? (arXiv 2604.26130, which found that it does not)

    python -m bench.reproduce.reward_lens MODEL DATA OUT [--pairs 100] [--head-pairs 100] [--tokens 96]

MODEL is a sequence-classification folder with SmolLM2's weights (examples/demo_data.py makes one). DATA holds pairs of
texts: the sdist of vaderSentiment 3.3.2, from whose review snippets *minimal* pairs are made (one word becomes its
opposite, tokens as many as before), or JSON lines, plain or .gz, of chosen and rejected dialogues (HH-RLHF's form).
Prints a table, writes reward_lens.json, .png and the grids of every pair (.npz, from which an interrupted run goes on)
to OUT. A quarter of an hour on two cores.

For every pair the rejected text's components are put into the chosen text's run (noising), measured three ways:

- *aligned*: all positions at once, each from its partner (`patch_sweep`'s alignment, the read tokens partners);
- *by index*: all positions at once, position i from position i, as the paper does; the same where lengths are equal;
- *read token*: at the token where the reward is read alone.

Predictions of these effects are differences between both texts' contributions at the token where each is read:

- *raw*: w·o_c, the paper's, without the final norm;
- *norm*: s (γ⊙w)·o_c, the final norm with its scale frozen, which adds up to the reward;
- *gradient*: attribution patching, the reward's gradient times the change of the activation, at the patched positions.

Correlations are within a pair over its sites, averaged over the pairs, with a bootstrap interval over the pairs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import rmfast
from bench.reproduce.snippets import read_snippets
from rmfast.interpret.comparison import LEAST_PAIRS, mean_of_pairs

MEASURED, PREDICTED = ("aligned", "by index", "read token"), ("raw", "norm", "gradient")
SITES: dict[str, Any] = {"components": ["attn_out", "mlp_out"], "heads": "head_out"}
BANDS = ("all", "first third", "middle third", "last third")
# Each word of a snippet that is in here becomes its opposite.
OPPOSITES = """good bad, best worst, better worse, great awful, wonderful terrible, brilliant stupid, funny boring,
    love hate, loved hated, beautiful ugly, smart dumb, rich poor, fresh stale, strong weak, warm cold, success failure,
    perfect horrible, interesting dull, original tired, clever silly, fun tedious, right wrong, happy sad, high low,
    always never, more less, most least, without with, hard easy, compelling pointless, fascinating empty"""

Pair = tuple[list[int], list[int]]


def minimal_pairs(path: Path, rm: Any, count: int, tokens: int) -> list[Pair]:
    """Snippets with one word replaced, the one with the higher reward first."""
    words = dict(pair.split() for pair in OPPOSITES.split(","))
    words |= {b: a for a, b in words.items()}
    found: list[Any] = []
    for _, text in read_snippets(path):
        for match in re.finditer(r"\w+", text):
            if len(found) < count and (new := words.get(match[0])) is not None:
                texts = [text, text[: match.start()] + new + text[match.end() :]]
                ids = [encoded.ids.tolist() for encoded in rm.encode(texts)]
                if len(ids[0]) == len(ids[1]) <= tokens:
                    found.append(ids)
                    break
    rewards = rm.score([ids for pair in found for ids in pair]).view(-1, 2)
    return [(a, b) if first >= second else (b, a) for (a, b), (first, second) in zip(found, rewards.tolist())]


def dialogue_pairs(path: Path, rm: Any, count: int, tokens: int) -> list[Pair]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found: list[Pair] = []
    for row in rows:
        a, b = (encoded.ids.tolist() for encoded in rm.encode([row["chosen"].strip(), row["rejected"].strip()]))
        if len(found) < count and max(len(a), len(b)) <= tokens and a != b:
            found.append((a, b))
    return found


def grids(rm: Any, pair: Pair, sites: str) -> dict[str, np.ndarray]:
    """By name of a prediction (and, for gradients, of what it predicts) or measurement, the effects of all sites."""
    clean, corrupted = pair
    read = [len(ids) - 1 for ids in pair]
    ways: dict[str, dict[str, Any]] = {
        "aligned": {"positions": "joint"},
        "by index": {"positions": "joint", "align": {i: i for i in range(min(read) + 1)}},
        "read token": {"positions": [read[0]], "align": {read[0]: read[1]}},
    }
    if read[0] == read[1]:
        del ways["by index"]
    parts = {
        name: rm.attribute(list(pair), components=SITES[sites], norm=norm)
        for name, norm in (("raw", "raw"), ("norm", "frozen"))
    }
    out: dict[str, np.ndarray] = {}
    for name, options in ways.items():
        sweep = rm.patch_sweep(clean, corrupted, mode="noising", sites=SITES[sites], **options)
        estimate = rm.attribution_patch(clean, corrupted, mode="noising", sites=SITES[sites], **options)
        out[name], out[f"gradient, {name}"] = sweep.effect.numpy(), estimate.effect.numpy()
        for way, (a, b) in parts.items():
            out[way] = (b.like(sweep) - a.like(sweep)).numpy()
    shape = (2, -1) if sites == "components" else (-1, rm.model.config.num_attention_heads)
    return {name: grid.reshape(shape) for name, grid in out.items()}


def kept(path: Path, rm: Any, pair: Pair, sites: str) -> dict[str, np.ndarray]:
    """`grids`, from the file where that is there and of this pair and model."""
    of = json.dumps([rm.fingerprint, *pair])
    if path.exists():
        found = dict(np.load(path))
        if str(found.pop("of", "")) == of:
            return found
    found, part = grids(rm, pair, sites), path.with_suffix(".part.npz")
    np.savez(part, of=of, **found)  # type: ignore[arg-type]
    part.replace(path)
    return found


def band(grid: np.ndarray, sites: str, name: str) -> np.ndarray:
    """The part of a grid, (site, layer) or (layer, head), in these layers."""
    axis = 1 if sites == "components" else 0
    layers = np.arange(grid.shape[axis])
    if name != "all":
        layers = np.array_split(layers, 3)[BANDS.index(name) - 1]
    return grid.take(layers, axis)


def table(found: list[dict[str, np.ndarray]], sites: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    each: dict[tuple[str, str, str], np.ndarray] = {}
    ways = [way for way in MEASURED if way in found[0]]
    for measured, name, predicted in product(ways, BANDS, PREDICTED):
        key = f"gradient, {measured}" if predicted == "gradient" else predicted
        sides = ([band(grid[side], sites, name) for grid in found] for side in (key, measured))
        compared = rmfast.compare(*sides)
        each[measured, name, predicted] = compared.each_spearman
        rows.append({
            "sites": sites, "measured": measured, "layers": name, "predicted": predicted,
            "spearman": compared.spearman._asdict(), "kendall": compared.kendall._asdict(),
        })  # fmt: skip
    # What the norm adds, and what the alignment does, over the pairs that have both.
    differences = [((way, "norm"), (way, "raw")) for way in ways]
    if "by index" in ways:
        differences += [(("aligned", predicted), ("by index", predicted)) for predicted in PREDICTED]
    for (a, b), name in product(differences, BANDS):
        more = mean_of_pairs(each[a[0], name, a[1]] - each[b[0], name, b[1]])
        measured, predicted = (x if x == y else f"{x} less {y}" for x, y in zip(a, b))
        rows.append({
            "sites": sites, "measured": measured, "layers": name, "predicted": predicted, "spearman": more._asdict(),
        })  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [way for way in MEASURED if any(row["measured"] == way for row in rows)]
    kinds = [sites for sites in SITES if any(row["sites"] == sites for row in rows)]
    size = (3.4 * len(shown), 3 * len(kinds))
    figure, axes = plt.subplots(len(kinds), len(shown), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for (i, sites), (j, way) in ((a, b) for a in enumerate(kinds) for b in enumerate(shown)):
        for k, predicted in enumerate(PREDICTED):
            wanted = (sites, way, predicted)
            some = [row["spearman"] for row in rows if (row["sites"], row["measured"], row["predicted"]) == wanted]
            value = np.array([row["value"] for row in some])
            spread = [[row["value"] - row["low"] for row in some], [row["high"] - row["value"] for row in some]]
            at = np.arange(len(some)) + 0.25 * (k - 1)
            axes[i, j].errorbar(at, value, spread, fmt="o", markersize=4, capsize=2, label=predicted)
        axes[i, j].axhline(0, color="0.7", linewidth=0.8)
        axes[i, j].set_xticks(range(len(BANDS)), [name.replace(" ", "\n") for name in BANDS])
        axes[i, j].set_title(f"{sites}, patched {way} (n {some[0]['n']})", fontsize=9)
    axes[0, 0].set_ylabel("mean Spearman within a pair")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, title="predicted by")
    plt.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--head-pairs", type=int, default=100, help="of them, for the larger grid of heads; 0 for none")
    parser.add_argument("--tokens", type=int, default=96, help="of a text, at most")
    args = parser.parse_args()
    if args.pairs < LEAST_PAIRS or 0 < args.head_pairs < LEAST_PAIRS:
        parser.error(f"a mean with an interval needs {LEAST_PAIRS} pairs")
    args.out.mkdir(parents=True, exist_ok=True)
    rm = rmfast.load(args.model)
    read = minimal_pairs if args.data.name.endswith(".tar.gz") else dialogue_pairs
    pairs = read(args.data, rm, args.pairs, args.tokens)
    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])
    facts = {
        "data": args.data.name, "pairs": len(pairs), "tokens (mean)": float(lengths.mean()),
        "pairs of equal length": int((lengths[:, 0] == lengths[:, 1]).sum()),
    }  # fmt: skip
    print(facts)
    rows: list[dict[str, Any]] = []
    for sites, count in (("components", len(pairs)), ("heads", args.head_pairs)):
        if not count:
            continue
        some = enumerate(tqdm(pairs[:count], desc=sites))
        found = [kept(args.out / f"{sites}-{i}.npz", rm, pair, sites) for i, pair in some]
        if len({len(each) for each in found}) > 1:  # equal lengths among unequal ones: by index is aligned
            for each in found:
                for name in ("", "gradient, "):
                    each.setdefault(f"{name}by index", each[f"{name}aligned"])
        rows += table(found, sites)
    (args.out / "reward_lens.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    plot(rows, args.out / "reward_lens.png")
    print(f"{'sites':<11} {'patched':<22} {'layers':<13} {'predicted by':<14} Spearman")
    for row in rows:
        value, low, high, n = row["spearman"].values()
        where = f"{row['sites']:<11} {row['measured']:<22} {row['layers']:<13} {row['predicted']:<14}"
        print(f"{where} {value:+.3f} [{low:+.3f}, {high:+.3f}] (n {n})")


if __name__ == "__main__":
    main()
