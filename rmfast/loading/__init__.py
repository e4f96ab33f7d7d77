"""Checkpoints and adapters to models with their tokenizers, by transformers and peft."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rmfast import arguments
from rmfast.binding.refusals import dropped_softcap
from rmfast.heads.given import expect_head
from rmfast.loading.adapters import is_adapter, load_adapter
from rmfast.loading.files import has_file
from rmfast.loading.heads import beside, load_body, wants_program
from rmfast.loading.models import load_model

_HUB_ARGUMENTS = ("cache_dir", "gguf_file", "local_files_only", "revision", "subfolder", "token")


def load_checkpoint(
    path: Any,
    *,
    dtype: Any = None,
    device: Any = None,
    trust_remote_code: bool = False,
    head: Any = None,
    pooling: str | int = "auto",
    compute: str = "auto",
    **kw: Any,
) -> tuple[nn.Module, Any, Any]:
    """A reward model, its tokenizer (None where there is none, with a warning), and its head where that is not the
    model's own: see `rmfast.load`."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise TypeError(f"Expected path_or_id to be a folder or a hub id, got {arguments.shown(path)}")
    arguments.flag("trust_remote_code", trust_remote_code)
    if head is not None and not isinstance(head, str):
        expect_head(head)
    if device is not None:
        torch.empty(0, device=arguments.device("device", device))  # torch says which it has not
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not (dtype is None or floating or (isinstance(dtype, str) and dtype == "auto")):
        raise ValueError(f"Expected dtype to be a floating dtype of torch or its name, got {arguments.shown(dtype)}")
    if device is not None and kw.get("device_map") is not None:
        raise ValueError("Expected device or device_map, got both")
    shared = {name: kw.pop(name) for name in _HUB_ARGUMENTS if name in kw} | {"trust_remote_code": trust_remote_code}
    options = {**kw, "dtype": "auto" if dtype is None else dtype}
    if device is None and kw.get("device_map") is None and torch.cuda.is_available():
        device = "cuda"
    _expect_there(path, shared)
    model: Any
    with _named(path):
        if is_adapter(path, shared):
            tokenizer = _load_tokenizer(path, shared) if has_file(path, "tokenizer_config.json", shared) else None
            head = beside(path, shared, head, {}, tokenizer)
            model, base, base_shared = load_adapter(path, shared, options, device, headed=head is not None)
            tokenizer = tokenizer or _load_tokenizer(base, base_shared)
        else:
            if compute == "fp32" or not isinstance(pooling, str):
                _expect_fit(path, shared, options, pooling, compute)
            if wants_program(path, shared, head):
                tokenizer = _load_tokenizer(path, shared)
                model, head = load_body(path, shared, options, device, head, tokenizer)
            else:
                model, tokenizer, head = load_model(path, shared, options, device), _load_tokenizer(path, shared), None
    if "attn_implementation" not in kw and dropped_softcap(model) is not None:
        model.set_attn_implementation("eager")
    return model, tokenizer, head


def _expect_there(path: Any, shared: dict[str, Any]) -> None:
    """FileNotFoundError for a path of nothing that can't be a hub id either, and for a folder without a model."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if os.path.isdir(path):
        folder = os.path.join(path, shared.get("subfolder") or "")
        configs = ("config.json", "adapter_config.json")
        if "gguf_file" not in shared and not any(os.path.exists(os.path.join(folder, name)) for name in configs):
            lacks = " or ".join(configs)
            raise FileNotFoundError(f"Expected {folder} to hold a model or an adapter: it has no {lacks}")
    elif not os.path.exists(path):
        try:
            validate_repo_id(os.fspath(path))
        except HFValidationError:
            what = "Expected path_or_id to be a folder or a hub id (NAME or OWNER/NAME)"
            raise FileNotFoundError(f"{what}: there is no folder {os.fspath(path)!r}") from None


@contextlib.contextmanager
def _named(path: Any) -> Iterator[None]:
    """Says of what is no folder here, if it can't be had from the hub, what that is: a path may be misspelt."""
    try:
        yield
    except OSError as error:
        if os.path.exists(path) or os.fspath(path) in str(error):
            raise
        raise OSError(f"There is no folder {os.fspath(path)!r} here, and of the hub: {error}") from error


def _expect_fit(path: Any, shared: dict[str, Any], options: dict[str, Any], pooling: str | int, compute: str) -> None:
    """ValueError for options that the checkpoint's configuration rules out."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, **shared)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(pooling, str) and rows is not None and not 0 <= pooling < rows:
        raise ValueError(f"Expected pooling to be a token id in [0, {rows}), got {pooling}")
    if compute == "fp32" and options["dtype"] == torch.float64:  # quantised weights may be dequantised as they load
        raise ValueError('Expected compute to be "native" or "auto", got "fp32": its weights are float64')


def _load_tokenizer(path: Any, shared: dict[str, Any]) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, **shared)
    except (OSError, ValueError, KeyError) as error:
        warnings.warn(f"No tokenizer could be loaded from {path}, so inputs must be token ids: {error}", stacklevel=4)
        return None
