"""Checkpoints of whole models."""

from __future__ import annotations

from typing import Any

from torch import nn

from rmfast.loading.weights import check_weights, restore_buffers

TASKS = ("SequenceClassification", "TokenClassification")


def load_model(
    path: Any,
    shared: dict[str, Any],
    options: dict[str, Any],
    device: Any,
    auto: str | None = None,
    replaced: frozenset[str] = frozenset(),
) -> nn.Module:
    """A reward model with all its weights.

    Args:
        path: a folder or hub id.
        shared: where on the hub, and trust_remote_code: for config, weights and tokenizer.
        options: further arguments of from_pretrained.
        device: where the weights go; None to leave that to the options.
        auto: the auto class; None for the one that the config names.
        replaced: names of weights that the caller brings along, and that may be missing.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, **shared)
    if auto is None and shared.get("gguf_file") and not config.architectures:
        raise ValueError(
            f"{shared['gguf_file']} in {path} is not a reward model: transformers reads the body of a GGUF file and no "
            "head. Load the checkpoint that it was made from, or give a head (docs/heads.md)"
        )
    auto = auto or _auto_class(path, config)
    own = (getattr(config, "auto_map", None) or {}).get(auto)
    # Without trust transformers takes a class of its own with other code, and no word about it.
    if own is not None and not shared["trust_remote_code"] and not hasattr(transformers, str(own).split(".")[-1]):
        raise ValueError(
            f"{path} is a model of its own code, {own} in auto_map, which only runs with trust_remote_code=True"
        )
    options = {**options, "ignore_mismatched_sizes": True}  # refused below, with their names
    if device is not None and (options.get("quantization_config") or getattr(config, "quantization_config", None)):
        options["device_map"], device = {"": device}, None  # quantised weights are made where they will stay
    model, info = getattr(transformers, auto).from_pretrained(path, output_loading_info=True, **shared, **options)
    restore_buffers(model, info)
    check_weights(path, model, info, replaced)
    return model.to(device) if device is not None else model


def _auto_class(path: Any, config: Any) -> str:
    """The auto class that makes a reward model of this config."""
    architectures = list(getattr(config, "architectures", None) or [])
    remote = getattr(config, "auto_map", None) or {}
    for task in TASKS:
        auto = f"AutoModelFor{task}"
        if any(name.endswith(f"For{task}") for name in architectures) or auto in remote:
            return auto
    if "AutoModel" in remote:  # a class of the checkpoint's own (InternLM2-reward); its structure will tell what it is
        return "AutoModel"
    raise ValueError(
        f"{path} is not a reward model: its config names {architectures or 'no architecture'}; rmfast looks "
        "for one that ends in ForSequenceClassification or ForTokenClassification; for one of these, or "
        "AutoModel, in auto_map (with trust_remote_code=True); or for a peft adapter (adapter_config.json). "
        "For a model with a head of your own: rmfast.RewardModel(model, tokenizer)"
    )
