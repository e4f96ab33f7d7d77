"""Models, clamps of a few of their neurons, and rewards under these from plain hooks on the unmodified model."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import models as M
import torch
import transformers
from torch import nn

from rmfast import NeuronClamp
from rmfast import interventions as I

DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,  # query_proj and key_proj are called twice, for tokens and for distances
    "position_buckets": 4,
}


def neox():
    torch.manual_seed(0)
    return M.randomised(
        transformers.GPTNeoXForSequenceClassification(transformers.GPTNeoXConfig(**M._SHAPE, num_labels=1))
    )


DECODERS = {
    **{name: (lambda name=name: M.decoder(name, labels=2)) for name in [*M.DECODERS, "gpt2"]},
    "llama-tokens": lambda: M.decoder("llama", task="TokenClassification"),
    "llama-mlp-head": lambda: M.mlp_head(M.decoder("llama")),
    "neox": neox,
}
PER_TOKEN = {
    **DECODERS,
    "bert-tokens": lambda: M.encoder("Bert", task="TokenClassification"),
    "deberta-tokens": lambda: M.encoder("DebertaV2", task="TokenClassification", **DEBERTA),
    "modernbert-tokens": lambda: M.encoder(
        "ModernBert", task="TokenClassification", cls_token_id=M.CLS, sep_token_id=M.SEP
    ),
}
ALL = {
    **PER_TOKEN,
    "bert": lambda: M.encoder("Bert", labels=2),
    "roberta": lambda: M.encoder("Roberta", pad_token_id=1, bos_token_id=0, eos_token_id=2),
    "electra": lambda: M.encoder("Electra"),
    "deberta": lambda: M.encoder("DebertaV2", **DEBERTA),
    "distilbert": lambda: M.encoder("DistilBert", hidden_dim=80),
}
_LONG = M.token_ids([50])[0]
# The second and third begin as the first does, and so do the fourth and fifth but for their ends; twins at the end.
TEXTS = [_LONG, _LONG[:30], _LONG[:29], [*_LONG[:30], 7, 8], [*_LONG[:30], 9], *M.token_ids([3, 1, 17], 1), _LONG[:30]]


def clamp(rm, positions, seed=0, per=2, names=None):
    """A few neurons of every projection, set to values of the size of their outputs."""
    rng = torch.Generator().manual_seed(seed)
    neurons = {
        name: (torch.randperm(size, generator=rng)[:per], torch.randn(per, generator=rng))
        for name, size in I.projections(rm).items()
        if names is None or name in names
    }
    return NeuronClamp(neurons, positions, rm.fingerprint)


def hooked(model, value, ids, read=None):
    """The reward (K,) of a text alone, by plain forward hooks on a copy of the unmodified model."""
    model = copy.deepcopy(model)  # dynamic rotary frequencies remember the longest text they have seen
    read = len(ids) - 1 if read is None else read
    with ExitStack() as stack:
        for name, (at, to) in value.neurons.items():
            calls = []

            def hook(module, args, out, at=at, to=to, calls=calls):
                calls.append(1)
                out = out.clone()
                if value.positions == "all":
                    out[..., at] = to
                elif len(calls) == 1:
                    out.view(-1, out.size(-1))[read, at] = to
                return out

            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        every = []
        if hasattr(model, "score"):
            stack.callback(model.score.register_forward_hook(lambda m, a, out: every.append(out)).remove)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits
        logits = every[0] if every else logits
    return logits[0, read] if logits.dim() == 3 else logits[0]


def truths(model, value, texts=TEXTS):
    want = torch.stack([hooked(model, value, ids) for ids in texts]).float()
    return want[:, 0] if want.size(1) == 1 else want


def same(got, want, least=1.0):
    M.assert_rewards(got, want, least)


def scaled(model):
    return (
        M.reward_scale(model)
        if isinstance(getattr(model, "score", None), nn.Linear) and hasattr(model.base_model, "norm")
        else 1.0
    )
