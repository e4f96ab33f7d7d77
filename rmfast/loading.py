"""Checkpoints to models with their tokenizers, by transformers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

_HUB_ARGUMENTS = ("cache_dir", "gguf_file", "local_files_only", "revision", "subfolder", "token")


def load_checkpoint(
    path: Any, *, dtype: Any = None, device: Any = None, trust_remote_code: bool = False, **kw: Any
) -> tuple[nn.Module, Any]:
    """A reward model and its tokenizer (None where there is none, with a warning): see `rmfast.load`."""
    if device is not None and kw.get("device_map") is not None:
        raise ValueError("Expected device or device_map, got both")
    shared = {name: kw[name] for name in _HUB_ARGUMENTS if name in kw} | {"trust_remote_code": trust_remote_code}
    options = {**kw, "dtype": "auto" if dtype is None else dtype, "trust_remote_code": trust_remote_code}
    if device is None and kw.get("device_map") is None and torch.cuda.is_available():
        device = "cuda"
    model = _load_model(path, shared, options, device)
    return model, _load_tokenizer(path, shared)


def _load_model(path: Any, shared: dict[str, Any], options: dict[str, Any], device: Any) -> nn.Module:
    import transformers

    if _is_adapter(path, shared):
        from peft import AutoPeftModelForSequenceClassification

        model = AutoPeftModelForSequenceClassification.from_pretrained(path, **options)
        return model.to(device) if device is not None else model

    config = transformers.AutoConfig.from_pretrained(path, **shared)
    architectures = list(getattr(config, "architectures", None) or [])
    remote = getattr(config, "auto_map", None) or {}
    for task in ("SequenceClassification", "TokenClassification"):
        auto = f"AutoModelFor{task}"
        if any(name.endswith(f"For{task}") for name in architectures) or auto in remote:
            break
    else:
        auto = "AutoModel"  # a class of the checkpoint's own (InternLM2-reward); its structure will tell what it is
        if auto not in remote:
            raise ValueError(
                f"{path} is not a reward model: its config names {architectures or 'no architecture'}; rmfast looks "
                "for one that ends in ForSequenceClassification or ForTokenClassification; for one of these, or "
                "AutoModel, in auto_map (with trust_remote_code=True); or for a peft adapter (adapter_config.json). "
                "For a model with a head of your own: rmfast.RewardModel(model, tokenizer)"
            )
    if device is not None and (options.get("quantization_config") or getattr(config, "quantization_config", None)):
        options["device_map"], device = {"": device}, None  # quantised weights are made where they will stay
    model, info = getattr(transformers, auto).from_pretrained(path, output_loading_info=True, **options)
    _check_head(path, model, info)
    return model.to(device) if device is not None else model


def _check_head(path: Any, model: nn.Module, info: dict[str, Any]) -> None:
    """Refuse a head that transformers has just filled with random numbers."""
    prefix = getattr(model, "base_model_prefix", "")
    missing = sorted(name for name in info.get("missing_keys", ()) if not name.startswith(f"{prefix}."))
    if missing:
        raise ValueError(
            f"{path} is not a reward model: it has no weights for its head, {', '.join(missing)}, which transformers "
            "would fill with random numbers"
        )


def _is_adapter(path: Any, shared: dict[str, Any]) -> bool:
    from transformers.utils import cached_file

    hub = {name: value for name, value in shared.items() if name not in ("gguf_file", "trust_remote_code")}

    def has(name: str) -> bool:
        found = cached_file(
            path,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        return found is not None

    return "gguf_file" not in shared and has("adapter_config.json") and not has("config.json")


def _load_tokenizer(path: Any, shared: dict[str, Any]) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, **shared)
    except (OSError, ValueError, KeyError) as error:
        warnings.warn(f"No tokenizer could be loaded from {path}, so inputs must be token ids: {error}", stacklevel=4)
        return None
