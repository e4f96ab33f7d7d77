"""Models, edits of a text and what plain hooks on the unmodified model make of them (tests/oracle.py)."""

from __future__ import annotations

import families as families_
import models as M
import numpy as np
import oracle as O
import pytest
import torch
import transformers
from torch import Tensor, nn

import rmfast
from rmfast.binding.binding import Binding
from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.sites import KINDS, Edits, Values
from rmfast.texts.inputs import Encoded

IDS, OTHER = M.token_ids([11, 11], seed=3)
READ = 9  # in the middle of nothing: a decoder's reward there depends on the tokens before it alone
LATE = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # RoBERTa counts positions from the pad id on
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,  # key_proj and query_proj are called twice, for tokens and for distances
    "position_buckets": 4,
    "conv_kernel_size": 3,  # layer 1 is not given what layer 0 gives
}


def other(family: str, **kw) -> nn.Module:
    """A decoder that tests/models.py does not make."""
    config = getattr(transformers, f"{family}Config")(**{**M._SHAPE, "num_labels": 1, **kw})
    torch.manual_seed(0)
    return M.randomised(getattr(transformers, f"{family}ForSequenceClassification")(config))


MAKERS = {
    **{name: (lambda name=name: M.decoder(name, labels=2)) for name in [*M.DECODERS, "gpt2"]},
    "llama-tokens": lambda: M.decoder("llama", task="TokenClassification"),
    "llama-mlp-head": lambda: M.mlp_head(M.decoder("llama")),
    "neox": lambda: other("GPTNeoX"),
    "neox-sequential": lambda: other("GPTNeoX", use_parallel_residual=False),
    **{name: (lambda name=name: families_.model(name)) for name in ("opt", "gptj", "falcon-serial")},
    "bert": lambda: M.encoder("Bert", labels=2),
    "bert-tokens": lambda: M.encoder("Bert", labels=2, task="TokenClassification"),
    "roberta": lambda: M.encoder("Roberta", **LATE),
    "electra": lambda: M.encoder("Electra"),
    "deberta": lambda: M.encoder("DebertaV2", **DEBERTA),
    "distilbert": lambda: M.encoder("DistilBert", hidden_dim=80),
    "modernbert": lambda: M.encoder("ModernBert", cls_token_id=M.CLS, sep_token_id=M.SEP),
}
families = pytest.mark.parametrize("family", MAKERS)
FEW = ["llama", "gemma2", "phi3", "gpt2", "neox", "bert", "deberta"]
few = pytest.mark.parametrize("family", FEW)


def bound(model: nn.Module) -> Binding:
    return rmfast.RewardModel(model).binding


def text(ids: list[int], types: list[int] | None = None) -> Encoded:
    return Encoded(np.array(ids), None if types is None else np.array(types))


def scale(model: nn.Module) -> float:
    """How large rewards can get: the norm of the head's widest row."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return float(linear.weight.detach().norm(dim=-1).max())


def grid(patcher: LayersPatcher, kinds: list[str]) -> Edits:
    """Every kind and layer: the first unit at position 0, and the last where the reward is read and at several."""
    groups = np.zeros((3, len(IDS)), bool)
    groups[0, 0] = groups[1, READ] = groups[2, [1, 4, 5, READ]] = True
    rows = [
        (KINDS.index(kind), layer, group, unit)
        for kind in kinds
        for layer in range(patcher.layers)
        for group, unit in enumerate((0, -1 % patcher.units(kind)[0], -1 % patcher.units(kind)[0]))
    ]
    kind, layer, group, unit = np.array(rows, np.int32).T
    return Edits(kind.astype(np.int8), layer, group, unit, groups)


def gradients(binding, kinds: set[str], metric=None):
    return LayersPatcher(binding).gradients(text(IDS), READ, kinds, metric)


def run(patcher: LayersPatcher, base, edits: Edits, values, batch_tokens: int = 33) -> Tensor:
    """Rewards (E, K), in batches of three; every edit is reported once."""
    rewards: list[Tensor | None] = [None] * len(edits)

    def done(indices: np.ndarray, some: Tensor) -> None:
        for i, reward in zip(indices, some):
            assert rewards[i] is None
            rewards[i] = reward

    patcher.rewards(base, edits, values, batch_tokens, done, np.zeros(len(edits), bool))
    return torch.stack(rewards)


def expected(model: nn.Module, edits: Edits, values, types=None) -> Tensor:
    out = []
    for kind, layer, group, unit in zip(edits.kind, edits.layer, edits.group, edits.unit):
        positions, layer, unit = np.flatnonzero(edits.groups[group]).tolist(), int(layer), int(unit)
        new = values(KINDS[kind], layer)[positions, unit]
        out.append(O.oracle(model, IDS, READ, KINDS[kind], layer, positions, unit, new, types))
    return torch.stack(out)


def noisy(record) -> Values:
    """What a record holds plus noise of its size, the same at every call."""

    def values(kind: str, layer: int) -> Tensor:
        x = record.activations(kind, layer)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(layer + 7 * KINDS.index(kind)))
        return x + noise.to(x) * x.std()

    return values


def traces(model: nn.Module) -> list:
    """What hooks and replaced forwards would leave behind."""
    return [
        (name, *map(dict, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)), "forward" in m.__dict__)
        for name, m in model.named_modules()
    ]
