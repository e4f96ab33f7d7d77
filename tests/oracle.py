"""Activation patching as anyone would write it: plain forward hooks on the unmodified model, one edit a forward.

The truth that rmfast's patching is judged by, so nothing here comes from rmfast. Where a kind lies is written down by
class name, family by family; resid_mid of a layer that adds to its stream is what attention's own sum gives, and is
patched by making attention add what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Place = tuple[str, str]  # a submodule of the layer, and "in" or "out"

_LLAMA: dict[str, Place] = {
    "attn_out": ("self_attn", "out"),
    "mlp_out": ("mlp", "out"),
    "head_out": ("self_attn.o_proj", "in"),
    "mlp_neuron": ("mlp.down_proj", "in"),
    "q": ("self_attn.q_proj", "out"),
    "k": ("self_attn.k_proj", "out"),
    "v": ("self_attn.v_proj", "out"),
}
_PHI = _LLAMA | dict.fromkeys("qkv", ("self_attn.qkv_proj", "out"))
_GEMMA = _LLAMA | {
    "attn_out": ("post_attention_layernorm", "out"),
    "mlp_out": ("post_feedforward_layernorm", "out"),
}
_BERT: dict[str, Place] = {
    "resid_mid": ("attention.output.LayerNorm", "out"),
    "attn_out": ("attention.output.dense", "out"),
    "mlp_out": ("output.dense", "out"),
    "head_out": ("attention.output.dense", "in"),
    "mlp_neuron": ("output.dense", "in"),
    "q": ("attention.self.query", "out"),
    "k": ("attention.self.key", "out"),
    "v": ("attention.self.value", "out"),
}
_DEBERTA = _BERT | {
    "q": ("attention.self.query_proj", "out"),
    "k": ("attention.self.key_proj", "out"),
    "v": ("attention.self.value_proj", "out"),
}
_DISTILBERT: dict[str, Place] = {
    "resid_mid": ("sa_layer_norm", "out"),
    "attn_out": ("attention", "out"),
    "mlp_out": ("ffn", "out"),
    "head_out": ("attention.out_lin", "in"),
    "mlp_neuron": ("ffn.lin2", "in"),
    "q": ("attention.q_lin", "out"),
    "k": ("attention.k_lin", "out"),
    "v": ("attention.v_lin", "out"),
}
_MODERNBERT: dict[str, Place] = {
    "attn_out": ("attn", "out"),
    "mlp_out": ("mlp", "out"),
    "head_out": ("attn.Wo", "in"),
    "mlp_neuron": ("mlp.Wo", "in"),
    **dict.fromkeys("qkv", ("attn.Wqkv", "out")),
}
_GPT2 = _MODERNBERT | {
    "head_out": ("attn.c_proj", "in"),
    "mlp_neuron": ("mlp.c_proj", "in"),
    **dict.fromkeys("qkv", ("attn.c_attn", "out")),
}
_NEOX: dict[str, Place] = {
    "attn_out": ("attention", "out"),
    "mlp_out": ("mlp", "out"),
    "head_out": ("attention.dense", "in"),
    "mlp_neuron": ("mlp.dense_4h_to_h", "in"),
    **dict.fromkeys("qkv", ("attention.query_key_value", "out")),
}
_OPT = _LLAMA | {
    "mlp_out": ("fc2", "out"),
    "head_out": ("self_attn.out_proj", "in"),
    "mlp_neuron": ("fc2", "in"),
}
_FALCON = _NEOX | {
    "attn_out": ("self_attention", "out"),
    "head_out": ("self_attention.dense", "in"),
    **dict.fromkeys("qkv", ("self_attention.query_key_value", "out")),
}
_GPTJ: dict[str, Place] = {
    "attn_out": ("attn", "out"),
    "mlp_out": ("mlp", "out"),
    "head_out": ("attn.out_proj", "in"),
    "mlp_neuron": ("mlp.fc_out", "in"),
    "q": ("attn.q_proj", "out"),
    "k": ("attn.k_proj", "out"),
    "v": ("attn.v_proj", "out"),
}
_GLM4 = _LLAMA | {"attn_out": ("post_self_attn_layernorm", "out"), "mlp_out": ("post_mlp_layernorm", "out")}
_FAMILIES: dict[str, dict[str, Place]] = {
    "OPTDecoderLayer": _OPT,
    "FalconDecoderLayer": _FALCON,
    "GPTJBlock": _GPTJ,
    "Olmo2DecoderLayer": _GEMMA,
    "Olmo3DecoderLayer": _GEMMA,
    "Starcoder2DecoderLayer": _LLAMA | {"mlp_neuron": ("mlp.c_proj", "in")},
    "PhiDecoderLayer": _LLAMA | {"head_out": ("self_attn.dense", "in"), "mlp_neuron": ("mlp.fc2", "in")},
    "Glm4DecoderLayer": _GLM4,
    **{f"{name}DecoderLayer": _LLAMA for name in ("Olmo", "Nemotron", "Cohere", "Cohere2", "StableLm", "Glm")},
    **dict.fromkeys(("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"), _LLAMA),
    **dict.fromkeys(("Gemma2DecoderLayer", "Gemma3DecoderLayer"), _GEMMA),
    **dict.fromkeys(("BertLayer", "RobertaLayer", "ElectraLayer", "XLMRobertaLayer"), _BERT),
    "Phi3DecoderLayer": _PHI,
    "DebertaV2Layer": _DEBERTA,
    "TransformerBlock": _DISTILBERT,
    "ModernBertEncoderLayer": _MODERNBERT,
    "GPT2Block": _GPT2,
    "GPTNeoXLayer": _NEOX,
}
_PARALLEL = ("CohereDecoderLayer", "Cohere2DecoderLayer", "PhiDecoderLayer", "GPTJBlock")


def kinds(model: nn.Module) -> list[str]:
    """The kinds of `rmfast.patching.sites.KINDS` that this model's layers have, in that order."""
    block = layers(model)[0]
    parallel = getattr(block, "use_parallel_residual", type(block).__name__ in _PARALLEL) or (
        type(block).__name__ == "FalconDecoderLayer" and not hasattr(block, "post_attention_layernorm")
    )
    every = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_out", "mlp_neuron", "q", "k", "v"]
    return [kind for kind in every if not (parallel and kind == "resid_mid")]


def layers(model: Any) -> nn.ModuleList:
    body = model.base_model
    for path in ("layers", "h", "decoder.layers", "encoder.layer", "transformer.layer"):
        try:
            return body.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(f"no layers in {type(body).__name__}")


def oracle(
    model: nn.Module,
    ids: Sequence[int],
    read: int,
    kind: str,
    layer: int,
    positions: Sequence[int],
    unit: int,
    values: Tensor,
    types: Sequence[int] | None = None,
) -> Tensor:
    """The reward (K,) of a text run alone with one edit: `values` (len(positions), width) in place of the activation.

    Args:
        read: where the reward is read; a model that pools by itself reads where it does.
        kind, layer, unit: as `rmfast.patching.sites` names them.
        types: token types, for encoders that take them.
    """
    rows = list(positions)
    block = layers(model)[layer]

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        (x if x.dim() == 2 else x[0])[rows, _columns(block, kind, unit, x.size(-1))] = values.to(x)
        return x

    with ExitStack() as stack:
        if kind == "resid_mid" and "resid_mid" not in _FAMILIES[type(block).__name__]:
            entered: list[Tensor] = []
            _at(stack, block, "in", entered.append)

            def missing(x: Tensor) -> Tensor:
                x = x.clone()
                x[0, rows] = values.to(x) - entered[0][0, rows]
                return x

            _at(stack, *_place(block, "attn_out"), missing)
        else:
            _at(stack, *_place(block, kind), edit)
        return _reward(model, ids, read, types)


def reward(model: nn.Module, ids: Sequence[int], read: int, types: Sequence[int] | None = None) -> Tensor:
    """The reward (K,) of a text run alone."""
    return _reward(model, ids, read, types)


def activation(
    model: nn.Module, ids: Sequence[int], kind: str, layer: int, types: Sequence[int] | None = None
) -> Tensor:
    """(T, units, width): the activation of a text run alone."""
    block = layers(model)[layer]
    if kind == "resid_mid" and "resid_mid" not in _FAMILIES[type(block).__name__]:
        return activation(model, ids, "resid_pre", layer, types) + activation(model, ids, "attn_out", layer, types)
    seen: list[Tensor] = []
    with ExitStack() as stack:
        _at(stack, *_place(block, kind), lambda x: seen.append(x.clone()))
        _reward(model, ids, 0, types)
    x = seen[0].reshape(-1, seen[0].size(-1))
    return torch.stack([x[:, _columns(block, kind, u, x.size(-1))] for u in range(_units(block, kind, x.size(-1)))], 1)


@contextmanager
def everything_in_fp64() -> Iterator[None]:
    """transformers computes norms, softmax and rotary angles in fp32 whatever the model's dtype; here in fp64.

    Only so is an fp64 model a truth to 1e-10, with slopes that finite differences can find.
    """
    wide = {"float32": torch.float64, "float": torch.float64}
    with mock.patch.multiple(torch, **wide), mock.patch.object(Tensor, "float", Tensor.double):
        yield


def _place(block: nn.Module, kind: str) -> tuple[nn.Module, str]:
    if kind in ("resid_pre", "resid_post"):
        return block, "in" if kind == "resid_pre" else "out"
    name, side = _FAMILIES[type(block).__name__][kind]
    return block.get_submodule(name), side


def _at(stack: ExitStack, module: nn.Module, side: str, use: Callable[[Tensor], Tensor | None]) -> None:
    """Calls use(x) on what the module is given or gives at its first call; a tensor that it returns takes x's place."""
    calls = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        calls.append(1)
        x = args[0] if args else kwargs["hidden_states"]
        new = use(x) if len(calls) == 1 else None
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(module: nn.Module, args: tuple, out: Any) -> Any:
        calls.append(1)
        new = use(out[0] if isinstance(out, tuple) else out) if len(calls) == 1 else None
        return (new, *out[1:]) if new is not None and isinstance(out, tuple) else new

    if side == "in":
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    else:
        stack.callback(module.register_forward_hook(after).remove)


def _sizes(block: nn.Module) -> tuple[int, int, int]:
    """Query heads, K/V heads and the size of a head."""
    attention = next(m for m in block.modules() if "Attention" in type(m).__name__ and hasattr(m, "config"))
    config: Any = attention.config
    heads = config.num_attention_heads
    grouped = type(block).__name__.endswith("DecoderLayer")  # others ignore the setting where a test's config has it
    kv = getattr(config, "num_key_value_heads", None) or heads if grouped else heads
    if type(block).__name__ == "FalconDecoderLayer":
        kv = attention.num_kv_heads
    return heads, kv, getattr(config, "head_dim", None) or config.hidden_size // heads


def _units(block: nn.Module, kind: str, size: int) -> int:
    heads, kv, _ = _sizes(block)
    return {"head_out": heads, "q": heads, "k": kv, "v": kv, "mlp_neuron": size}.get(kind, 1)


def _columns(block: nn.Module, kind: str, unit: int, size: int) -> slice:
    heads, kv, d = _sizes(block)
    if kind == "mlp_neuron":
        return slice(unit, unit + 1)
    if kind not in ("head_out", "q", "k", "v"):
        return slice(0, size)
    start = unit * d
    if kind in "qkv" and _place(block, "q")[0] is _place(block, "k")[0]:
        if type(block).__name__ in ("GPTNeoXLayer", "FalconDecoderLayer"):  # a head of k and v behind its heads of q
            each = heads // kv
            group, i = divmod(unit, each) if kind == "q" else (unit, each + "kv".index(kind))
            start = (group * (each + 2) + i) * d
        else:
            start += {"q": 0, "k": heads * d, "v": (heads + kv) * d}[kind]
    return slice(start, start + d)


def _reward(model: Any, ids: Sequence[int], read: int, types: Sequence[int] | None) -> Tensor:
    inputs = {"input_ids": torch.tensor([list(ids)], device=model.device)}
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([list(types)], device=model.device)
    with torch.no_grad(), ExitStack() as stack:
        every: list[Tensor] = []
        if hasattr(model, "score"):  # a decoder's head runs on all tokens, and its model then picks one
            _at(stack, model.score, "out", every.append)
        logits = model(**inputs).logits
    logits = every[0] if every else logits
    return logits[0, read] if logits.dim() == 3 else logits[0]
