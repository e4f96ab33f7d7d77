"""Tiny random checkpoints with heads in their published layouts, and the formula of each, written plainly in fp64."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import models as M
import torch
from safetensors.torch import save_file
from torch import Tensor
from written import write_weights

D = 48  # the width of `models.decoder`
PATTERN = [M.EOS, M.ASSISTANT]  # what its chat template puts between a prompt and its response
PAIRS = [
    ("a question", "an answer"),
    ("a question", "another, longer answer"),
    ("a question", "no"),
    ("say it", "it, " * 9),
    ("why?", "because"),
]


def body(family: str = "llama", **kw: Any) -> Any:
    return M.decoder(family, **kw).model


def random(*shape: int, seed: int = 0) -> Tensor:
    """Of a scale that keeps what goes through it of order 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / (
        shape[-1] ** 0.5 if len(shape) > 1 else 3
    )


def linears(name: str, *sizes: int, numbers: Any = None, bias: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Layers name.0, name.1, ... (or other numbers) of these sizes."""
    found: dict[str, Tensor] = {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        at = f"{name}.{i if numbers is None else numbers[i]}"
        found[f"{at}.weight"] = random(m, n, seed=seed + 2 * i)
        if bias:
            found[f"{at}.bias"] = random(m, seed=seed + 2 * i + 1)
    return found


def write(
    path: Path,
    model: Any,
    head: dict[str, Tensor],
    *,
    prefix: str = "model.",
    form: str = "safetensors",
    files: dict[str, dict[str, Tensor]] | None = None,
    tokenizer: Any = None,
    **config: Any,
) -> Path:
    """A folder with a body's weights under a prefix, head tensors among them, and others in files of their own."""
    path.mkdir(exist_ok=True)
    weights = {prefix + name: x.clone() for name, x in model.state_dict().items()} | head
    (path / "config.json").write_text(json.dumps({**model.config.to_dict(), **config}))
    (tokenizer or M.tokenizer("decoder", chat=True)).save_pretrained(path)
    write_weights(path, weights, form)
    for name, some in (files or {}).items():
        if name.endswith(".safetensors"):
            save_file(some, path / name)
        else:
            torch.save(some, path / name)
    return path


def states(model: Any, encoded: list[Any]) -> list[Tensor]:
    """The final normed hidden states (T, d) of each text alone, fp64."""
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        return [wide(input_ids=torch.from_numpy(item.ids)[None]).last_hidden_state[0] for item in encoded]


def layered(weights: dict[str, Tensor], name: str, numbers: Any, activation: Any, x: Tensor) -> Tensor:
    """An MLP by its tensors, fp64."""
    for i, number in enumerate(numbers):
        x = x if i == 0 else activation(x)
        x = x @ weights[f"{name}.{number}.weight"].double().T
        if f"{name}.{number}.bias" in weights:
            x = x + weights[f"{name}.{number}.bias"].double()
    return x


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach(), want.detach()
    error = (got.double() - want).abs().max()
    assert float(error) <= 1e-5 * max(1.0, float(want.abs().max())), float(error)


def assert_alike(rm: Any, inputs: list[Any], want: Tensor) -> None:
    """Both engines give what is wanted, and the packed one the same bits for each input alone and for all."""
    packed = rm.score(inputs)
    assert_near(packed, want)
    assert_near(rm.score(inputs, engine="padded"), want)
    assert not isinstance(rm.packed_engine(), str) and rm.moves() is None
    assert torch.equal(packed, torch.cat([rm.score([item]) for item in inputs]))
    assert torch.equal(packed, rm.score(inputs, batch_tokens=16))
