"""Does TCRM make a reward model's value at the middle of a response a forecast of its end? (arXiv 2604.22981)

    python -m bench.reproduce.tcrm MODEL DATA OUT [--depth 12] [--pairs 500] [--epochs 4] ...

MODEL is a sequence-classification folder with SmolLM2's weights. DATA holds preference pairs: the sdist of
vaderSentiment 3.3.2 (human-rated review snippets, two rated more than 1 apart are a pair, no text is in two pairs), or
JSON lines, plain or .gz, of chosen and rejected dialogues that end with the assistant's turn (HH-RLHF's form).

The first --depth layers of the model are used. The top ones of these, and a new head, are trained with BT and with
TCRM, from the same start over the same batches; the layers below are frozen and run once. Prints a table, and writes
tcrm.json and tcrm.png to OUT. As it stands minutes on two cores.

Measured on held-out pairs, with r_0 .. r_K the values at a response's tokens:

- accuracy at a share f of the responses: of r_k with k = round(f K), chosen over rejected; f = 1 is the final reward;
- final-Δ MSE: the mean of (r_k − r_K)² over all k < K of all responses; also relative to the variance of r_K, since it
  grows with the square of the rewards' scale.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.reproduce.snippets import read_snippets
from rmfast import losses

SHARES = (0.25, 0.5, 0.75, 1.0)
LOSSES = {  # smooth, lookahead, and reduction over a response's tokens
    "BT": (0.0, 0.0, "sum"),
    "TCRM, sums 0.1, 0.01 (the paper's)": (0.1, 0.01, "sum"),
    "TCRM, means 0.1, 0.1": (0.1, 0.1, "mean"),
    "TCRM, means 0.3, 0.3": (0.3, 0.3, "mean"),
}
LAYER_RATE, HEAD_RATE = 5e-4, 1e-3
EVAL_BATCH = 64

Ids = list[int]
Side = tuple[Ids, int]  # a text's tokens, and where its response starts


def snippet_pairs(path: Path, tokenizer: Any, count: int, args: argparse.Namespace) -> list[tuple[Side, Side]]:
    """Longer snippets are left out: cut, they would no longer be what people rated."""
    rated = read_snippets(path)
    pairs: list[tuple[Side, Side]] = []
    for (a, text_a), (b, text_b) in zip(rated[::2], rated[1::2]):
        if abs(a - b) > 1 and len(pairs) < count:
            sides = [([*tokenizer(text)["input_ids"], tokenizer.eos_token_id], 0) for text in (text_a, text_b)]
            if max(len(ids) for ids, _ in sides) <= args.response_tokens:
                pairs.append((sides[0], sides[1]) if a > b else (sides[1], sides[0]))
    return pairs


def dialogue_pairs(path: Path, tokenizer: Any, count: int, args: argparse.Namespace) -> list[tuple[Side, Side]]:
    """Prompts keep their last tokens, responses their first ones."""

    def side(text: str) -> Side:
        prompt, mark, response = text.rpartition("\n\nAssistant:")
        before = tokenizer(prompt + mark)["input_ids"][-args.prompt_tokens :]
        after = tokenizer(response)["input_ids"][: args.response_tokens]
        return before + after + [tokenizer.eos_token_id], len(before)

    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return [(side(rows[i]["chosen"]), side(rows[i]["rejected"])) for i in order]


class Tops:
    """A body's top layers and head, trained from the same start each time, on states that the layers below gave."""

    def __init__(self, model: Any, depth: int, layers: int) -> None:
        self.body, self.norm, self.count = model.model, model.model.norm, layers
        self.body.norm = nn.Identity()  # `linear_value_loss` applies it
        every = list(self.body.layers[:depth])
        self.below, self.top = nn.ModuleList(every[:-layers]), nn.ModuleList(every[-layers:])
        self.start = {name: p.clone() for name, p in self.trained().state_dict().items()}
        self.head = torch.zeros(model.config.hidden_size)

    def trained(self) -> nn.ModuleList:
        return nn.ModuleList([*self.top, self.norm])

    def reset(self) -> None:
        self.trained().load_state_dict(self.start)
        self.head = torch.zeros_like(self.head).requires_grad_()

    def run(self, layers: nn.ModuleList, inputs: dict[str, Tensor]) -> Tensor:
        self.body.layers = layers
        # Padding lies right of every text, which no causal token sees: no mask.
        return self.body(**inputs, use_cache=False).last_hidden_state

    @torch.no_grad()
    def frozen(self, texts: list[Ids]) -> list[Tensor]:
        """States (T, d) that enter the top layers."""
        found: list[Any] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in tqdm(range(0, len(order), EVAL_BATCH), "frozen layers"):
            rows = order[first : first + EVAL_BATCH]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(texts[i]) for i in rows], batch_first=True)
            for i, state in zip(rows, self.run(self.below, {"input_ids": ids})):
                found[i] = state[: len(texts[i])].clone()
        return found

    def hidden(self, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """States before the norm (B, T, d), and which of them are tokens."""
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
        lengths = torch.tensor([len(x) for x in states])
        return self.run(self.top, {"inputs_embeds": padded}), torch.arange(padded.size(1)) < lengths[:, None]

    @torch.no_grad()
    def values(self, states: list[Tensor]) -> list[Tensor]:
        found: list[Any] = [None] * len(states)
        order = sorted(range(len(states)), key=lambda i: len(states[i]))
        for first in range(0, len(order), EVAL_BATCH):
            rows = order[first : first + EVAL_BATCH]
            hidden, _ = self.hidden([states[i] for i in rows])
            for i, value in zip(rows, self.norm(hidden) @ self.head):
                found[i] = value[: len(states[i])]
        return found


class Pairs:
    def __init__(self, pairs: list[tuple[Side, Side]], tops: Tops) -> None:
        sides = [side for pair in zip(*pairs) for side in pair]  # chosen ones, then rejected ones
        self.count, self.starts = len(pairs), torch.tensor([start for _, start in sides])
        self.states = tops.frozen([ids for ids, _ in sides])
        self.tokens = sum(map(len, self.states))

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Indices (2 size,), chosen then rejected, of pairs of about one length."""
        lengths = torch.tensor([max(map(len, self.states[i :: self.count])) for i in range(self.count)])
        noisy = lengths + 8 * torch.rand(self.count, generator=generator)
        batches = noisy.argsort().split(size)
        for i in torch.randperm(len(batches), generator=generator):
            yield torch.cat((batches[i], batches[i] + self.count))


def train(tops: Tops, data: Pairs, terms: tuple[float, float, str], args: argparse.Namespace, seed: int) -> None:
    smooth, lookahead, reduction = terms
    tops.reset()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tops.head.normal_(0, 0.02, generator=generator)
    optimizer = torch.optim.AdamW(
        [{"params": list(tops.trained().parameters()), "lr": LAYER_RATE}, {"params": [tops.head], "lr": HEAD_RATE}]
    )
    steps = args.epochs * -(-data.count // args.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    for _ in range(args.epochs):
        for rows in data.batches(args.batch, generator):
            hidden, mask = tops.hidden([data.states[i] for i in rows])
            loss, _ = losses.linear_value_loss(
                hidden, tops.head, mask, norm="rms", norm_weight=tops.norm.weight, eps=tops.norm.variance_epsilon,
                smooth=smooth, lookahead=lookahead, response_start=data.starts[rows], reduction=reduction,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def measure(tops: Tops, data: Pairs) -> dict[str, float]:
    responses = [value[start:] for value, start in zip(tops.values(data.states), data.starts)]
    found = {}
    for share in SHARES:
        read = torch.stack([r[round(share * (len(r) - 1))] for r in responses])
        found[f"accuracy at {share:.0%}"] = 100 * float((read[: data.count] > read[data.count :]).float().mean())
    final = torch.stack([r[-1] for r in responses])
    found["final-Δ MSE"] = float(torch.cat([(r[:-1] - r[-1]).square() for r in responses]).mean())
    found["relative to var r_K"] = found["final-Δ MSE"] / float(final.var())
    return found


def show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0]["values"])
    print(f"\n| loss | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for row in rows:
        cells = [f"{np.mean(v):.{d}f} ± {np.std(v, ddof=1):.{d}f}" for name, v in row["values"].items()
                 for d in [1 if "accuracy" in name else 2]]  # fmt: skip
        print(f"| {row['loss']} | {' | '.join(cells)} |")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for row in rows:
        seeds = np.array([row["values"][f"accuracy at {share:.0%}"] for share in SHARES])
        ax.errorbar(SHARES, seeds.mean(1), seeds.std(1, ddof=1), marker="o", capsize=3, label=row["loss"])
    ax.set(xlabel="share of the response read", ylabel="pairs ordered right, %", xticks=SHARES)
    ax.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "out"):
        parser.add_argument(name, type=Path)
    number: Callable[..., Any] = lambda name, default: parser.add_argument(f"--{name}", type=int, default=default)  # noqa: E731
    defaults = {"pairs": 500, "held-out": 500, "depth": 12, "layers": 1, "epochs": 4, "batch": 8, "seeds": 3}
    for name, default in defaults.items():
        number(name, default)
    number("prompt-tokens", 48)
    number("response-tokens", 32)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    read = snippet_pairs if args.data.name.endswith(".tar.gz") else dialogue_pairs
    pairs = read(args.data, tokenizer, args.pairs + args.held_out, args)
    tops = Tops(model, args.depth, args.layers)
    held_out, training = (Pairs(part, tops) for part in (pairs[: args.held_out], pairs[args.held_out :]))
    print(f"{training.count} pairs of {training.tokens} tokens to train, {held_out.count} held out", flush=True)
    rows = []
    for name, terms in LOSSES.items():
        found = []
        for seed in range(args.seeds):
            train(tops, training, terms, args, seed)
            found.append(measure(tops, held_out))
            print(name, seed, {key: round(value, 2) for key, value in found[-1].items()}, flush=True)
        rows.append({"loss": name, "values": {key: [f[key] for f in found] for key in found[0]}})
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("model", "data", "out")}
    (args.out / "tcrm.json").write_text(json.dumps({"settings": settings, "losses": rows}, indent=1))
    show(rows)
    plot(rows, args.out / "tcrm.png")


if __name__ == "__main__":
    main()
