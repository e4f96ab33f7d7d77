"""Checkpoints and adapters to models with their tokenizers, by transformers and peft."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import nn

from rmfast import arguments
from rmfast.loading.adapters import is_adapter, load_adapter
from rmfast.loading.models import has_file, load_model

_HUB_ARGUMENTS = ("cache_dir", "gguf_file", "local_files_only", "revision", "subfolder", "token")


def load_checkpoint(
    path: Any, *, dtype: Any = None, device: Any = None, trust_remote_code: bool = False, **kw: Any
) -> tuple[nn.Module, Any]:
    """A reward model and its tokenizer (None where there is none, with a warning): see `rmfast.load`."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise TypeError(f"Expected path_or_id to be a folder or a hub id, got {arguments.shown(path)}")
    arguments.flag("trust_remote_code", trust_remote_code)
    if device is not None:
        arguments.device("device", device)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not (dtype is None or isinstance(dtype, torch.dtype) or (isinstance(dtype, str) and dtype == "auto")):
        raise ValueError(f"Expected dtype to be a dtype of torch or its name, got {arguments.shown(dtype)}")
    if device is not None and kw.get("device_map") is not None:
        raise ValueError("Expected device or device_map, got both")
    shared = {name: kw.pop(name) for name in _HUB_ARGUMENTS if name in kw} | {"trust_remote_code": trust_remote_code}
    options = {**kw, "dtype": "auto" if dtype is None else dtype}
    if device is None and kw.get("device_map") is None and torch.cuda.is_available():
        device = "cuda"
    if not is_adapter(path, shared):
        return load_model(path, shared, options, device), _load_tokenizer(path, shared)
    model, base, base_shared = load_adapter(path, shared, options, device)
    if has_file(path, "tokenizer_config.json", shared):
        return model, _load_tokenizer(path, shared)
    return model, _load_tokenizer(base, base_shared)


def _load_tokenizer(path: Any, shared: dict[str, Any]) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, **shared)
    except (OSError, ValueError, KeyError) as error:
        warnings.warn(f"No tokenizer could be loaded from {path}, so inputs must be token ids: {error}", stacklevel=4)
        return None
