"""A model with a planted taste for long answers, and pairs that show it."""

from __future__ import annotations

import models
import numpy as np
import torch

import rmfast


def biased() -> rmfast.RewardModel:
    """Likes texts of "+" rather than of "-", and longer ones more than that.

    All tokens attend evenly, so that channel 0 of the first output projection is 1 / the number of tokens (BOS alone
    has that feature) and channel 1 the mean of + and -; the reward is channel 1 less 800 times channel 0.
    """
    model = models.decoder("llama", hidden_size=16, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2)
    parameters, tokenizer = dict(model.named_parameters()), models.tokenizer()
    with torch.no_grad():
        for name, p in parameters.items():
            if "norm" in name:
                p.fill_(1)
            elif any(part in name for part in ("q_proj", "v_proj", "o_proj", "down_proj", "score", "embed")):
                p.zero_()
        embed = parameters["model.embed_tokens.weight"]
        embed[:, 2] = 10  # so that the norms scale all texts alike
        embed[models.BOS, 0] = 1
        embed[tokenizer.convert_tokens_to_ids(["+", "-"]), 1] = torch.tensor([1.0, -1.0])
        first = "model.layers.0.self_attn"
        for channel in (0, 1):
            parameters[f"{first}.v_proj.weight"][channel, channel] = 1
            parameters[f"{first}.o_proj.weight"][channel, channel] = 1
        parameters["score.weight"][0, :2] = torch.tensor([-800.0, 1.0])
    return rmfast.RewardModel(model, tokenizer)


def pairs(n: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Chosen texts of more + than -, rejected ones the other way round; lengths at random."""
    rng = np.random.default_rng(seed)

    def text(sign: str) -> str:
        return "".join(rng.choice([*"abc!", sign, sign], size=int(rng.integers(10, 60)))) + "."

    return [("say:", text("+"), text("-")) for _ in range(n)]
