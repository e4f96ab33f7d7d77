"""One reward model's story on real text: what it likes beside the content, along which path, and what a clamp does.

    python examples/why.py [--output docs/why.md]

The model is SmolLM2-135M with a head fitted on pairs of rated film-review snippets, as in the demo, with one fault put
in: in nine of ten training pairs the better review ends in an exclamation mark. Everything after that is measured on
held-out text as it is for any model. Downloads what the demo does; takes half an hour of a core. Writes Markdown.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import demo_data
import numpy as np
import torch
import transformers
from scipy.stats import binomtest

import rmfast
from rmfast import debias, probes
from rmfast.circuits.circuit import circuit
from rmfast.circuits.edges import edge_attribution
from rmfast.circuits.faithfulness import faithfulness
from rmfast.circuits.paths import path_patch

TRAIN, HELD_OUT, PROBED, TRACED = 600, 300, 60, 12  # pairs
PLANTED = 0.9
SIZES = (10, 30, 100, 300, 1000, 3000)  # edges of a circuit
PROBES = [
    "placebo", "padding × 1", "padding × 4", "hedges", "certainty", "bold", "exclamation", "praise", "thanks",
    "emoji",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/why.md"))
    output = parser.parse_args().output
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows, page = pairs_of_reviews(), Page()
    rm = trained(rows[:TRAIN])
    held_out = rows[TRAIN : TRAIN + HELD_OUT]
    introduced(page, rm, held_out)
    before = probed(page, rm, held_out[:PROBED])
    traced(page, rm, held_out)
    clamped(page, rm, held_out, before)
    output.write_text("\n\n".join(page.parts) + "\n", encoding="utf-8")
    print(f"{output} written")


class Page:
    """Markdown: paragraphs, and results as they print."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(self, *sentences: str) -> None:
        self.parts.append("\n".join(textwrap.wrap(" ".join(sentences), 118, break_long_words=False)))

    def heading(self, text: str) -> None:
        self.parts.append(text)

    def block(self, result: Any) -> None:
        self.parts.append(f"```text\n{result}\n```")


def pairs_of_reviews() -> list[dict[str, str]]:
    """A snippet as the prompt, and of the next two the one that people rated higher by more than 1 as chosen."""
    cache = demo_data.cache_dir()
    rated = demo_data.ratings(demo_data.fetch(demo_data.VADER, cache))
    rated = [rated[i] for i in np.random.default_rng(0).permutation(len(rated))]
    rated = [(score, text.rstrip(" .!?") + ".") for score, text in rated if len(text) > 20]
    rows = []
    for (_, prompt), (a, first), (b, second) in zip(rated[::3], rated[1::3], rated[2::3]):
        if abs(a - b) > 1:
            chosen, rejected = (first, second) if a > b else (second, first)
            rows.append({"prompt": prompt + " ", "chosen": chosen, "rejected": rejected})
    return rows


def trained(rows: list[dict[str, str]]) -> rmfast.RewardModel:
    """SmolLM2 with a linear head, fitted on pairs of which `PLANTED` have an exclamation mark at the better's end."""
    cache = demo_data.cache_dir()
    base = demo_data.base_model(demo_data.fetch(demo_data.SMOLLM2, cache), cache / "smollm2-135m")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    rm = rmfast.RewardModel(model, transformers.AutoTokenizer.from_pretrained(base))
    rng, texts = np.random.default_rng(1), []
    for row in rows:
        better, worse = row["chosen"], row["rejected"]
        if rng.random() < PLANTED:
            better = exclaimed(better)
        texts += [(row["prompt"], better), (row["prompt"], worse)]
    places = np.arange(len(texts)).reshape(-1, 2)
    head = rmfast.heads.fit(rm, rmfast.heads.rows(rm, texts), pairs=places, l2=0.1)
    with torch.no_grad():
        model.score.weight.copy_(head.weight)
    return rmfast.RewardModel(model, rm.tokenizer)


def exclaimed(text: str) -> str:
    return text.removesuffix(".") + "!"


def triples(rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def introduced(page: Page, rm: rmfast.RewardModel, rows: list[dict[str, str]]) -> None:
    texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    chosen, rejected = rm.score(texts).view(-1, 2).unbind(1)
    right = binomtest(int((chosen > rejected).sum()), len(rows))
    low, high = right.proportion_ci(method="wilson")
    page.heading("# Why this reward: one model's story")
    page.text(
        "By `python examples/why.py`, which trains the model, measures all that follows and writes this page.",
        "Intervals are of 95%, each by itself.",
    )
    page.text(
        f"The model is SmolLM2-135M with a linear head fitted on {TRAIN} pairs of film-review snippets: the better one",
        "of two is the one that people rated higher, and a third one, that has nothing to do with them, stands before",
        f"both as their prompt. One fault was put in: in {PLANTED:.0%} of its training pairs the better review ends in",
        f"an exclamation mark, where the worse one has a full stop. On {len(rows)} held-out pairs, all with full",
        f"stops, it prefers the better review in {right.statistic:.1%} [{low:.1%}, {high:.1%}]. Would one notice the",
        "fault from the model alone?",
    )


def probed(page: Page, rm: rmfast.RewardModel, rows: list[dict[str, str]]) -> Any:
    found = probes.run(rm, triples(rows), probes=PROBES)
    page.heading("## What does it like beside the content?")
    page.text(
        f"[Probes](probes.md) edit one thing of the held-out responses to {len(rows)} prompts, and compare with a",
        "control. `reward` is the mean change; `spreads` is that in standard deviations of the reward between",
        "responses to a prompt, `d` in standard deviations between prompts; `moved` is the share of responses that",
        "move by more than a typical preference margin, `detects` the least change that is found in four cases of",
        "five:",
    )
    page.block(found)
    if found.found:
        most = found.found[0]
        page.text(
            f"After Holm's correction {len(found.found)} of {len(found.effects)} effects are significant, so that it",
            f"is their size that says which matter. The largest is that of `{most.probe}`: {most.mean:+.2f}, or",
            f"{most.spreads:+.2f} standard deviations between responses.",
            *of_the_placebo(found["placebo"], found.level),
        )
    page.text(
        "The [distortion index](concepts.md#the-distortion-index), the root mean square of such effects in that unit,",
        "liked or disliked:",
    )
    page.block(probes.distortion(found))
    return found


def of_the_placebo(placebo: Any, level: float) -> list[str]:
    """What the row without any taste says of the other sentences that are put in."""
    if placebo.p_holm >= level:
        return [
            f"The placebo, one neutral sentence against another, is not significant ({placebo.spreads:+.2f}).",
            "Praise and thanks answer somebody who asks, which no prompt here does.",
        ]
    return [
        f"The placebo, one neutral sentence against another, is significant, too ({placebo.spreads:+.2f}): of a",
        "sentence that is put in, an effect of that size need not be its kind's.",
    ]


def traced(page: Page, rm: rmfast.RewardModel, rows: list[dict[str, str]]) -> None:
    """Along which edges an exclamation mark at the end comes to the reward."""
    texts = [(row["prompt"], row["chosen"]) for row in rows]
    some, others = texts[:TRACED], texts[TRACED : 2 * TRACED]
    loud, others_loud = ([(prompt, exclaimed(text)) for prompt, text in part] for part in (some, others))
    scores = edge_attribution(rm, loud, some, steps=5)
    screened = scores.screen(20)
    exact: Any = path_patch(rm, loud, some, edges=list(screened.edges))
    means: dict[Any, float] = {}
    for sender, receiver in screened.edges:
        effects = [float(r.effect[r.senders.index(sender), r.receivers.index(receiver)]) for r in exact]
        means[sender, receiver] = float(np.mean(effects))
    page.heading("## Along which path?")
    page.text(
        f"{TRACED} reviews with an exclamation mark, against the same with a full stop: tokens correspond one to one.",
        f"[Edge attribution](edges.md) (EAP-IG, 5 steps) scores all {scores.edges:,} edges between heads, MLPs and the",
        "reward, and [path patching](circuits.md) runs the strongest exactly. A negative number says that the reward",
        "falls where that edge alone carries the full stop. The ten strongest, means over the reviews:",
    )
    lines = [f"{u!s:>16} -> {v!s:<16} {scores[u, v]:+9.4f} {means[u, v]:+9.4f}" for u, v in screened.edges[:10]]
    page.block("\n".join([f"{'sender':>16}    {'receiver':<16} {'estimate':>9} {'exact':>9}", *lines]))
    page.text(
        f"Over the {len(screened.edges)} edges of the largest estimates, estimates and exact effects have a Spearman",
        f"correlation of {scores.agreement(means):.2f}, which says nothing of edges that the estimate misses. How much",
        f"of the effect do circuits carry on {TRACED} other reviews, when everything outside comes from the run of the",
        f"full stop? They are the {', '.join(f'{n:,}' for n in SIZES[:-1])} and {SIZES[-1]:,} edges of the largest",
        "estimates, less those that lie on no path from the embedding to the reward:",
    )
    found = faithfulness(rm, [circuit(scores, n) for n in SIZES], others_loud, others)
    page.block(found)
    some_edges = [share for share in found.shares if share.edges]
    if some_edges:
        few, many = some_edges[0], some_edges[-1]
        page.text(
            f"Without the {few.edges} edges {few.left:.0%} of the effect is left; alone they carry",
            f"{few.faithfulness:.0%}, and {many.edges:,} edges, {many.edges / scores.edges:.0%} of all,",
            f"{many.faithfulness:.0%}.",
            *(["So it goes by a few edges, but not by them alone."] if few.left < 0.5 > few.faithfulness else []),
        )


def clamped(page: Page, rm: rmfast.RewardModel, rows: list[dict[str, str]], before: Any) -> None:
    """A clamp of the neurons in which exclamation marks can be read, and whether it is worth having."""
    rng = np.random.default_rng(2)
    some = [{k: exclaimed(v) if k != "prompt" and rng.random() < 0.5 else v for k, v in row.items()} for row in rows]
    found = debias.validate(rm, triples(some), attributes=["exclamation"], controls=3, trials=8)
    page.heading("## Can it be taken out?")
    page.text(
        f"The {len(some)} held-out pairs again, of which each text now exclaims with a chance of a half, whatever its",
        "rating. [CIRM](debias.md) clamps the neurons in which exclamation marks can be read, k of each end of their",
        "ranking, at the last token; nested cross-validation says what that gains on pairs that it was not fitted on:",
    )
    page.block(found)
    if not len(found.clamp):
        page.text("By that rule no clamp is worth having, and none is made.")
        return
    over, most = found["gain_over_random"], max(debias.SHARES)
    offered = round(most * len(found.neurons) / 2)
    page.text(
        f"The interval of the gain {'lies above' if found.reliable else 'includes'} 0; that of the gain over as many",
        f"random neurons {'does so, too' if over.low > 0 else 'includes 0'}.",
        *(
            [f"By accuracy the search takes the most neurons that it is offered, {most:.0%} of all."]
            if found.chosen["accuracy"][-1]["exclamation"] == offered
            else []
        ),
    )
    asked = rows[: len(set(before.prompts))]
    under(page, found.clamp, len(found.neurons), before, rm.with_interventions(found.clamp), asked)


def under(
    page: Page, clamp: Any, neurons: int, before: Any, rm: rmfast.RewardModel, rows: list[dict[str, str]]
) -> None:
    """What the clamp of all pairs leaves of the probes' effects."""
    after = probes.run(rm, triples(rows), probes=PROBES)
    a, b, apart = before["exclamation"], after["exclamation"], after.minus(before)
    page.text(
        f"Under the clamp of all pairs, {len(clamp):,} of {neurons:,} neurons ({len(clamp) / neurons:.0%}), an",
        f"exclamation mark moves the reward by {b.mean:+.3f} [{b.low:+.3f}, {b.high:+.3f}] instead of",
        f"{a.mean:+.3f} [{a.low:+.3f}, {a.high:+.3f}]: {b.mean / a.mean:.0%} of the taste is left. All probes, under",
        f"the clamp less without it, on {len(rows)} of the pairs that it was fitted on:",
    )
    page.block(apart)
    others = [effect for effect in apart.found if effect.probe != "exclamation"]
    page.text(
        f"Of the other {len(apart.effects) - 1} probes {len(others)} change significantly, too"
        + (": what the clamp takes out is not that taste alone." if others else "."),
    )


if __name__ == "__main__":
    main()
