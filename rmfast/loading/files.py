"""The tensors of a checkpoint's files, by name, before any model is made of them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

# Files of weights, the first that is there; and those of heads beside them, with what their names lack.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HEADS = {
    "value_head.safetensors": "",
    "value_head.bin": "",
    "regression_layer.pt": "regression_layer.",
    "gating_layer.pt": "gating_layer.",
}
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_HUB = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def cached(path: Any, name: str, shared: dict[str, Any]) -> str | None:
    """Where a file of a folder, or of a repository of the hub, is on this machine; None where there is none."""
    from transformers.utils import cached_file

    return cached_file(
        path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **{key: value for key, value in shared.items() if key in _HUB},
    )


def has_file(path: Any, name: str, shared: dict[str, Any]) -> bool:
    """Whether a folder, or a repository of the hub, has this file."""
    return cached(path, name, shared) is not None


class Tensors:
    """Tensors by name: of a whole checkpoint, or of what lies beside one or beside an adapter.

    Args:
        path, shared: as for `rmfast.loading.models.load_model`.
        whole: whether the checkpoint's own weights are among them.

    Pickles are read with weights_only=True: tensors and nothing else.
    """

    def __init__(self, path: Any, shared: dict[str, Any], whole: bool = True) -> None:
        self.path, self.shared = path, shared
        self._places: dict[str, tuple[str, str]] = {}  # the file, and the name in it
        self._pickles: dict[str, dict[str, Tensor]] = {}
        found = next((f for name in WEIGHTS if (f := cached(path, name, shared)) is not None), None) if whole else None
        if found is not None and found.endswith(".index.json"):
            with open(found, encoding="utf-8") as file:
                places = json.load(file)["weight_map"]
            files = {name: cached(path, name, shared) for name in set(places.values())}
            if None in files.values():
                raise ValueError(
                    f"{path} lacks files that its index names: {sorted(n for n in files if files[n] is None)}"
                )
            self._places |= {name: (str(files[place]), name) for name, place in places.items()}
        elif found is not None:
            self._places |= {name: (found, name) for name in self._listed(found)}
        for name, prefix in _HEADS.items():
            if (beside := cached(path, name, shared)) is not None:
                self._places |= {prefix + inside: (beside, inside) for inside in self._listed(beside)}

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def files(self) -> dict[str, dict[str, str]]:
        """Of each file the tensors by name, with what they are called in the file."""
        found: dict[str, dict[str, str]] = {}
        for name, (file, inside) in self._places.items():
            found.setdefault(file, {})[name] = inside
        return found

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes by name, without reading the tensors of safetensors files."""
        from safetensors import safe_open

        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for file, names in self.files().items():
            if file.endswith(".safetensors"):
                with safe_open(file, "pt") as opened:
                    parts = {name: opened.get_slice(inside) for name, inside in names.items()}
                    found |= {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts.items()}
            else:
                pickled = {name: self._pickle(file)[inside] for name, inside in names.items()}
                found |= {name: (tuple(x.shape), _CODES.get(x.dtype, str(x.dtype))) for name, x in pickled.items()}
        return found

    def _listed(self, file: str) -> list[str]:
        if not file.endswith(".safetensors"):
            return list(self._pickle(file))
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            return list(opened.keys())

    def _pickle(self, file: str) -> dict[str, Tensor]:
        if file not in self._pickles:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before torch 1.6, which can't be mapped
                loaded = torch.load(file, map_location="cpu", weights_only=True)
            self._pickles[file] = {name: x for name, x in loaded.items() if isinstance(x, Tensor)}
        return self._pickles[file]

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors of their own, by name."""
        from safetensors import safe_open

        found: dict[str, Tensor] = {}
        for name in names:
            file, inside = self._places[name]
            if file.endswith(".safetensors"):
                with safe_open(file, "pt") as opened:
                    found[name] = opened.get_tensor(inside)
            else:
                found[name] = self._pickle(file)[inside].clone()
        return found
