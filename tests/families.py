"""Small random models of the dense decoder families, each with the options in which its layers differ from Llama's."""

from __future__ import annotations

from typing import Any

import models as M
import torch
import transformers
from transformers.modeling_layers import GenericForSequenceClassification

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HALF = {**_ROPE, "partial_rotary_factor": 0.5}
_FALCON = {"alibi": False, "multi_query": False, "bias": True}

# Names of their own to classes of transformers and what a tiny configuration has besides `models._SHAPE`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPT", {"ffn_dim": 80, "word_embed_proj_dim": 48}),
    "gpt2": ("GPT2", {}),
    "gptj": ("GPTJ", {"rotary_dim": 4}),
    "neox": ("GPTNeoX", {"rope_parameters": _HALF}),
    "neox-serial": ("GPTNeoX", {"use_parallel_residual": False}),
    "falcon-serial": ("Falcon", {**_FALCON, "parallel_attn": False}),
    "falcon-7b": ("Falcon", {**_FALCON, "multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-40b": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "falcon-11b": (
        "Falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "olmo": ("Olmo", {}),
    "olmo-clipped": ("Olmo", {"clip_qkv": 0.8}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "nemotron": ("Nemotron", {"head_dim": 12, "mlp_bias": True}),
    "cohere": ("Cohere", {}),
    "cohere-qk": ("Cohere", {"use_qk_norm": True}),
    "cohere2": ("Cohere2", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "starcoder2": ("Starcoder2", {"sliding_window": 16}),
    "stablelm": ("StableLm", {"rope_parameters": _HALF}),
    "stablelm-parallel": ("StableLm", {"rope_parameters": _HALF, "use_parallel_residual": True, "use_qkv_bias": True}),
    "stablelm-qk": ("StableLm", {"rope_parameters": _HALF, "qk_layernorm": True}),
    "phi": ("Phi", {"rope_parameters": _HALF}),
    "phi-qk": ("Phi", {"qk_layernorm": True}),
    "glm": ("Glm", {"head_dim": 12}),
    "glm4": ("Glm4", {"head_dim": 12}),
}
# Whose keys have fewer heads by `num_key_value_heads`.
_GROUPED = ("Olmo", "Olmo2", "Olmo3", "Nemotron", "Cohere", "Cohere2", "Starcoder2", "StableLm", "Phi", "Glm", "Glm4")


def model(family: str, labels: int = 1, seed: int = 0, layers: int = 2, **kw: Any) -> Any:
    """A decoder of the family with a reward head, fp32, eval mode."""
    prefix, extra = FAMILIES[family]
    common = {name: value for name, value in M._SHAPE.items() if prefix in _GROUPED or name != "num_key_value_heads"}
    shape = {**common, "num_labels": labels, "num_hidden_layers": layers, **extra, **kw}
    if "layer_types" in shape:
        shape["layer_types"] = [shape["layer_types"][i % 2] for i in range(layers)]
    config = getattr(transformers, f"{prefix}Config")(**shape)
    torch.manual_seed(seed)
    return M.randomised(_class(prefix)(config), seed)


def _class(prefix: str) -> Any:
    """transformers' class, or the one that its generic parts make (Cohere)."""
    found = getattr(transformers, f"{prefix}ForSequenceClassification", None)
    if found is not None:
        return found
    base = getattr(transformers, f"{prefix}PreTrainedModel")
    return type(f"{prefix}ForSequenceClassification", (GenericForSequenceClassification, base), {})
