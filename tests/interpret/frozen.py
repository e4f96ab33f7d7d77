"""Models, and their reward as a linear map of the stream: the final norm frozen at a text."""

from __future__ import annotations

import models as M
import oracle as O
import torch
import transformers
from torch import nn

IDS = M.token_ids([21], seed=3)[0]
FINE = ("embedding", "head_out", "mlp_neuron")
FAMILIES = [*M.DECODERS, "gpt2", "neox"]
POST_NORM = ("gemma2", "gemma3")


def model(family="llama", dtype=torch.float64, labels=1, **kw):
    if family != "neox":
        return M.decoder(family, labels=labels, num_hidden_layers=3, **kw).to(dtype)
    config = transformers.GPTNeoXConfig(**{**M._SHAPE, "num_hidden_layers": 3, "num_labels": labels})
    torch.manual_seed(0)
    return M.randomised(transformers.GPTNeoXForSequenceClassification(config)).to(dtype)


def biased(m, labels=1):
    """A head with a bias."""
    m.score = nn.Linear(m.config.hidden_size, labels).to(m.dtype)
    return m


def final_norm(m):
    body = m.base_model
    return next(getattr(body, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(body, name))


def head(m):
    return next(getattr(m, name) for name in ("score", "classifier") if hasattr(m, name))


def scale(m):
    """‖γ⊙w‖₂."""
    norm = final_norm(m)
    gain = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
    return float((head(m).weight * gain).norm(dim=-1).max().detach())


def slope(m, ids):
    """(K, T, d): the reward as a linear map of the stream, its final norm frozen at this text, by that very norm."""
    with torch.no_grad():
        stream = O.activation(m, ids, "resid_post", len(O.layers(m)) - 1)[:, 0]
        norm, w = final_norm(m), head(m).weight
        gain = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
        centred = stream - stream.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else stream
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        a = w * gain
        a = a - a.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else a
        return a[:, None] / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
