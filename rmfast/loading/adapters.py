"""peft adapters: the model that they change, with the head that they bring."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.loading.files import WEIGHTS, has_file
from rmfast.loading.models import TASKS, load_model
from rmfast.loading.weights import expect_none_left_out, listed

_PREFIX = "base_model.model."  # of names in an adapter's file
_AUTO = dict(zip(("SEQ_CLS", "TOKEN_CLS"), (f"AutoModelFor{task}" for task in TASKS)))
_PLACEMENT = ("device_map", "max_memory", "offload_folder", "offload_dir")


def is_adapter(path: Any, shared: dict[str, Any]) -> bool:
    """Whether a folder or hub id holds an adapter; the base's config.json and a tokenizer may lie beside it."""
    if "gguf_file" in shared or not has_file(path, "adapter_config.json", shared):
        return False
    whole = [name for name in WEIGHTS if has_file(path, name, shared)]
    if whole:  # of which transformers makes one with the other on top
        raise ValueError(
            f"{path} holds a whole model ({whole[0]}) and an adapter (adapter_config.json): which of them "
            "is meant? Move the other to a folder of its own"
        )
    return True


def load_adapter(
    path: Any, shared: dict[str, Any], options: dict[str, Any], device: Any, headed: bool = False
) -> tuple[nn.Module, str, dict[str, Any]]:
    """The base model with the adapter in it; the base's path, and its `shared`.

    headed: whether a head comes from elsewhere, so that the base may be a language model.
    """
    import peft

    hub = {name: value for name, value in shared.items() if name != "trust_remote_code"}
    config: Any = peft.PeftConfig.from_pretrained(path, **hub)
    base, task = config.base_model_name_or_path, config.task_type
    if not base:
        raise ValueError(f"{path} is an adapter that does not say of which model: no base_model_name_or_path")
    if task not in (None, "FEATURE_EXTRACTION", *_AUTO, *(["CAUSAL_LM"] if headed else [])):
        raise ValueError(
            f"{path} is not a reward model: Expected an adapter of task_type {', '.join(_AUTO)}, got {task}"
        )
    base_shared = {name: value for name, value in shared.items() if name not in ("revision", "subfolder")}
    base_shared["revision"] = config.revision or "main"
    auto = _auto_class(task, config) or ("AutoModelForCausalLM" if headed else None)
    weights = peft.load_peft_weights(path, device="cpu", **hub)
    saved = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    try:
        if "num_labels" not in options and auto is not None and auto in _AUTO.values():
            options = {**options, **_head_size(auto, base, base_shared, saved)}
        model: Any = load_model(base, base_shared, options, device, auto, replaced=frozenset(saved))
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{path} is an adapter on {base}, which could not be loaded: {error}") from error
    rows = _embedding_rows(model, config, saved)
    if rows > model.get_input_embeddings().weight.size(0):
        model.resize_token_embeddings(rows, mean_resizing=False)
    placement = {name: options[name] for name in _PLACEMENT if name in options}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # peft goes on with random numbers
        try:
            model = peft.PeftModel.from_pretrained(model, path, config=config, **hub, **placement)
        except (KeyError, UserWarning) as error:
            raise ValueError(
                f"{path} lacks weights of its own adapter: {error}. It has {listed(sorted(weights))}"
            ) from error
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ValueError(
                f"{path} does not fit {base} with num_labels={model.config.num_labels}: {error}"
            ) from error
    # peft takes what fits and is silent about the rest.
    unplaced = peft.set_peft_model_state_dict(model, weights).unexpected_keys  # type: ignore[attr-defined]
    expect_none_left_out(path, model.get_base_model(), [name.removeprefix(_PREFIX) for name in unplaced])
    return model.eval(), base, base_shared


def _auto_class(task: str | None, config: Any) -> str | None:
    """The auto class that makes the adapter's base; None for the one that the base's own config names."""
    made_as = (config.auto_mapping or {}).get("base_model_class", "")  # where the adapter has no task_type
    found = [f"AutoModelFor{name}" for name in TASKS if made_as.endswith(f"For{name}")]
    return _AUTO.get(task or "") or (found[0] if found else None)


def _head_size(auto: str, base: str, shared: dict[str, Any], saved: dict[str, Tensor]) -> dict[str, int]:
    """num_labels of the head that the adapter's file holds, for a base that is made with another number."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(base, **shared)
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(config, trust_remote_code=shared["trust_remote_code"])
    sizes = {
        saved[name].size(0)
        for name, p in model.named_parameters()
        if name in saved
        and saved[name].dim() == p.dim() > 0
        and saved[name].shape[1:] == p.shape[1:]
        and p.size(0) == config.num_labels
    }
    return {"num_labels": sizes.pop()} if len(sizes) == 1 else {}


def _embedding_rows(model: Any, config: Any, saved: dict[str, Tensor]) -> int:
    """Rows of the embedding that the adapter was trained on, where it brings them along; others have no weights."""
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    tables = [saved[name] for name in (f"{embedding}.weight", f"{embedding}.base_layer.weight") if name in saved]
    tokens = getattr(config, "trainable_token_indices", None) or []
    if isinstance(tokens, dict):
        tokens = tokens.get(embedding.split(".")[-1], [])
    return max([table.size(0) for table in tables] + [1 + max(tokens, default=-1)])
