"""Checkpoints whose head transformers has no class for: its own class of the body, and a program for the head."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from rmfast.heads import Head, TokenHead
from rmfast.heads.table import Found, kind_of, named, token_head
from rmfast.loading.files import Tensors
from rmfast.loading.models import TASKS, load_model
from rmfast.loading.weights import expect_none_left_out, listed

# Heads over the vocabulary, which may lie beside a reward head.
_LANGUAGE = re.compile(r"(^|\.)(lm_head|embed_out|output)\.")
_NAME_IT = (
    'Name a head: rmfast.load(..., head="NAME") for NAME.weight, or NAME.0.weight, NAME.2.weight and so on with ReLU '
    "between; rmfast.TokenHead(...) for rows of a language model's head; one of rmfast.heads with tensors of your own; "
    "or a function of the final hidden states (docs/heads.md)"
)


def wants_program(path: Any, shared: dict[str, Any], head: Any) -> bool:
    """Whether a checkpoint's head is not one that transformers makes with its body."""
    import transformers

    if head is not None:
        return True
    if "gguf_file" in shared or shared["trust_remote_code"]:
        return False
    config = _written(path, shared)
    architectures = config.get("architectures") or []
    if config.get("classifier_from_token"):
        return True
    own = any(name.endswith(f"For{task}") and hasattr(transformers, name) for name in architectures for task in TASKS)
    if not own:
        return any(hasattr(transformers, name) for name in architectures) or bool(Tensors(path, shared).names)
    tensors = Tensors(path, shared)  # classes of a checkpoint's own code may have the name of transformers'
    names = set(tensors.names)
    return kind_of(Found(names, _before("layers.0.", names), config, tensors.read)) is not None


def load_body(
    path: Any, shared: dict[str, Any], options: dict[str, Any], device: Any, head: Any, tokenizer: Any
) -> tuple[nn.Module, Any]:
    """The model to run and the head to put on it: a body and a program, or a language model and a `TokenHead`.

    Args:
        path, shared, options, device: as for `load_model`.
        head: what the caller gives, None for the one that the checkpoint holds.

    Raises:
        ValueError: the checkpoint has no head that is known, lacks weights, or has some that are not the head's.
    """
    import transformers

    written = _written(path, shared)
    head = token_head(written) if head is None else head
    config = transformers.AutoConfig.from_pretrained(path, **shared)
    if isinstance(head, TokenHead):
        if (rows := getattr(config.get_text_config(), "vocab_size", None)) is not None:
            head.ids(tokenizer, rows)  # before gigabytes are loaded
        return load_model(path, shared, options, device, "AutoModelForCausalLM"), head
    with torch.device("meta"):
        empty = transformers.AutoModel.from_config(config, trust_remote_code=shared["trust_remote_code"])
    tensors = Tensors(path, shared)
    before = _before(next(iter(empty.state_dict())), tensors.names)
    parts = {name for name, _ in empty.named_children()}
    if head is None or isinstance(head, str):
        outside = {
            n for n in tensors.names if not n.startswith(before) or (not before and n.split(".")[0] not in parts)
        }
        head = _program(path, Found(outside, before, written, tensors.read, tokenizer), head)
    if before not in ("", f"{empty.base_model_prefix}."):
        options = {**options, "key_mapping": {f"^{re.escape(before)}": ""}}
    model, info = _from_pretrained(path, config, shared, options, device)
    missing = sorted({*info["missing_keys"]} | {name for name, *_ in info["mismatched_keys"]})
    if missing := [name for name in missing if not name.startswith("pooler.")]:
        raise ValueError(f"{path} has no weights of their shapes for {listed(missing)} of {type(model).__name__}")
    if not getattr(model, "is_quantized", False):
        unplaced = [name.removeprefix(before) for name in info["unexpected_keys"]]
        expect_none_left_out(path, model, [name for name in unplaced if name.split(".")[0] in parts])
    return model, head


def _written(path: Any, shared: dict[str, Any]) -> dict[str, Any]:
    """config.json as it stands: the object of transformers lacks what it takes for options of generation."""
    import transformers

    hub = {name: value for name, value in shared.items() if name != "trust_remote_code"}
    return transformers.PretrainedConfig.get_config_dict(path, **hub)[0]


def _from_pretrained(path: Any, config: Any, shared: dict[str, Any], options: dict[str, Any], device: Any) -> Any:
    """The body, and what transformers says of its weights."""
    import transformers

    options = {**options, "ignore_mismatched_sizes": True}
    if device is not None and (options.get("quantization_config") or getattr(config, "quantization_config", None)):
        options["device_map"], device = {"": device}, None
    logger = transformers.utils.logging
    level = logger.get_verbosity()
    logger.set_verbosity_error()  # a report of the head's tensors, for which its class of the body has no place
    try:
        model, info = transformers.AutoModel.from_pretrained(path, output_loading_info=True, **shared, **options)
    finally:
        logger.set_verbosity(level)
    return (model if device is None else model.to(device)), info


def beside(path: Any, shared: dict[str, Any], head: Any, config: dict[str, Any], tokenizer: Any) -> Any:
    """The head of an adapter, in files of its own (value_head.safetensors), or what the caller gives; None: neither."""
    if head is not None and not isinstance(head, str):
        return head
    tensors = Tensors(path, shared, whole=False)
    if not tensors.names and head is None:
        return None
    return _program(path, Found(set(tensors.names), "", config, tensors.read, tokenizer), head)


def _program(path: Any, found: Found, name: str | None) -> Head:
    """The head in what lies outside of a checkpoint's body, by its name or by the table."""
    head: Head | None
    if name is not None:
        head = named(found, name)
        if head is None:
            raise ValueError(
                f"Expected a head {name} in {path}; outside of its body are {_shown(found.names)}. {_NAME_IT}"
            )
        return head
    kind = kind_of(found)
    if kind is None:
        own = ", ".join(map(str, (found.config.get("auto_map") or {}).values()))
        raise ValueError(
            f"{path} is not a reward model: its config names {found.config.get('architectures') or 'no architecture'}, "
            f"and its tensors outside of the body, {_shown(found.names)}, are of no head that rmfast knows. {_NAME_IT}"
            + (f". Its own code, {own} in auto_map, only runs with trust_remote_code=True" if own else "")
        )
    head = kind.make(found)
    left = {name for name in found.names - found.used if not _LANGUAGE.search(name)}
    if left:
        raise ValueError(
            f"{path} has a head like that of {kind.of}, and beside it {_shown(left)}, which are no part of one. "
            + _NAME_IT
        )
    return head


def _shown(names: set[str]) -> str:
    return listed(sorted(names)) or "none"


def _before(name: str, names: Any) -> str:
    """What stands before a body's names in a checkpoint, given one of them or what it begins with."""
    found = [each[: each.index(name)] for each in names if each.startswith(name) or f".{name}" in each]
    return min((each for each in found if not each or each.endswith(".")), key=len, default="")
