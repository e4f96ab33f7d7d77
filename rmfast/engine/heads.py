"""Queries, keys and values of a decoder layer: how its projections lie, norms of heads, rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.compute import outside
from rmfast.binding.modules import active, is_plain, is_readable
from rmfast.binding.norms import eps_of
from rmfast.engine.norms import Norm
from rmfast.ops import rotary

# How rotary embeddings turn a head: dimension i with i + R / 2 with a table that has its angles twice (Llama) or once
# (gpt-oss), 2i with 2i + 1 with a table that has them twice one after the other (GLM), side by side (Cohere), or once
# (GPT-J since transformers 5.24); not at all (OPT, some layers of Cohere 2).
ROTATIONS = ("half", "half once", "pairs", "twins", "pairs once", None)

_OUT = ("o_proj", "out_proj", "dense", "c_proj")
_FUSED = {"qkv_proj": False, "c_attn": False, "query_key_value": True}  # whether k and v stand beside their queries
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))


@dataclass
class HeadsNorm:
    """A layer norm of each head that has a gain of its own (H, D): Cohere's weight, StableLM's norm for each head."""

    module: Any

    @property
    def modules(self) -> list[nn.Module]:
        return [active(norm) for norm in getattr(self.module, "norms", [self.module])]

    def __call__(self, heads: Tensor) -> Tensor:
        """(n, H, D) -> (n, H, D)."""
        norms: list[Any] = self.modules
        weight = norms[0].weight if len(norms) == 1 else torch.stack([norm.weight for norm in norms])
        wide = torch.promote_types(torch.promote_types(heads.dtype, weight.dtype), torch.float32)
        normed = nn.functional.layer_norm(heads.to(wide), heads.shape[-1:], eps=eps_of(norms[0]))
        return (normed * weight.to(wide)).to(heads.dtype)


@dataclass
class Heads:
    """How an attention module makes its heads of normed rows.

    Attributes:
        attn: the module.
        size: of a head, D.
        out: the name of its output projection.
        fused: the name of the one projection of all three, or None for q_proj, k_proj and v_proj.
        norms: of queries and keys: over a head, over all heads in one (OLMo 2), or `HeadsNorm`; or None.
        count, kv_count: heads of queries, and of keys and values, as a run has shown them.
        rotation: one of ROTATIONS.
    """

    attn: Any
    size: int
    out: str
    fused: str | None
    norms: tuple[Any, Any] | None
    count: int = 0
    kv_count: int = 0
    rotation: str | None = None

    @classmethod
    def of(cls, attn: Any) -> Heads | str:
        """An attention module by its parts, or why it is not taken apart."""
        parts = {name for name, part in attn.named_children() if not isinstance(part, nn.Dropout)}
        out = next((name for name in _OUT if name in parts), None)
        fused = next((name for name in _FUSED if name in parts), None)
        pair = next((pair for pair in _NORMS if {*pair} <= parts), None)
        known = {out, fused, *(pair or ()), "rotary_emb"} | (set() if fused else {"q_proj", "k_proj", "v_proj"})
        if out is None or parts - known or not (fused or {"q_proj", "k_proj", "v_proj"} <= parts):
            return "its attention has other parts than q, k, v and o projections"
        size = _head_size(attn)
        if not is_plain(attn) or size is None:
            return "it carries hooks, or its attention names no head_dim"
        if getattr(getattr(attn, "config", None), "clip_qkv", None) is not None:
            return "its attention clips queries, keys and values"
        norms = None if pair is None else tuple(_norm_of_heads(getattr(attn, name), size) for name in pair)
        if norms is not None and (None in norms or type(norms[0]) is not type(norms[1])):
            return f"its {' and '.join(pair or ())} are no norms of heads of one kind and eps"
        return cls(attn, size, out, fused, norms)  # type: ignore[arg-type]

    def moved(self, copies: Mapping[nn.Module, nn.Module]) -> Heads:
        norms = self.norms and tuple(replace(norm, module=copies[norm.module]) for norm in self.norms)
        return replace(self, attn=copies[self.attn], norms=norms)

    @property
    def o_proj(self) -> Any:
        """The output projection."""
        return getattr(self.attn, self.out)

    @property
    def kv_proj(self) -> Any:
        """The projection whose columns tell how many heads keys have."""
        return self.attn.k_proj if self.fused is None else getattr(self.attn, self.fused)

    @property
    def normed(self) -> list[tuple[nn.Module, nn.Module]]:
        """The norms of queries and keys, each with the projection whose columns it must be given."""
        made = (self.attn.q_proj, self.attn.k_proj) if self.fused is None else (self.kv_proj, self.kv_proj)
        return [(norm.module, projection) for norm, projection in zip(self.norms or (), made)]

    @property
    def norm_modules(self) -> list[nn.Module]:
        found = []
        for norm in self.norms or ():
            found += [norm.module, *(norm.modules if isinstance(norm, HeadsNorm) else [active(norm.module)])]
        return found

    @property
    def modules(self) -> list[Any]:
        """The projections of queries, keys and values, or the one of all three."""
        names = ("q_proj", "k_proj", "v_proj") if self.fused is None else (self.fused,)
        return [getattr(self.attn, name) for name in names]

    def project(self, y: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (at the rows `read`), keys and values (n, heads, D) of normed rows, before norms and rotation."""
        first, *rest = self.modules
        if rest:
            return self.parted([first(y if read is None else y[read]), *(module(y) for module in rest)])
        q, k, v = self.parted([first(y)])
        return q if read is None else q[read], k, v

    def parted(self, made: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (n, heads, D) of what `modules` give, (n, columns) each."""
        if self.fused is None:
            q, k, v = (x.unflatten(-1, (-1, self.size)) for x in made)
        elif _FUSED[self.fused]:
            groups = made[0].unflatten(-1, (self.kv_count, -1, self.size))
            q, k, v = groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
        else:
            heads = made[0].unflatten(-1, (-1, self.size))
            q, k, v = heads.split([self.count, self.kv_count, self.kv_count], dim=1)
        return q, k, v

    def joined(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """What `modules` give, of queries, keys and values: `parted` the other way round."""
        if self.fused is None:
            return [x.flatten(1) for x in (q, k, v)]
        if _FUSED[self.fused]:
            return [torch.cat([q.unflatten(1, (self.kv_count, -1)), k[:, :, None], v[:, :, None]], 2).flatten(1)]
        return [torch.cat([q, k, v], 1).flatten(1)]

    def turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after their norms and rotation, as attention takes them; either may have no heads.

        Where pairs side by side turn together their dimensions come in another order, the same for both (`ordered`).
        """
        norms: dict[str, Any] = {}
        if self.rotation is not None and self.rotation.endswith("once"):
            cos, sin = (torch.cat([table, table], 1) for table in (cos, sin))
        halves = self.rotation in ("half", "half once")
        if self.norms is not None:
            q_norm, k_norm = self.norms
            if halves and cos.size(1) and _in_the_op(q_norm, k_norm, self.size):
                of = q_norm.arguments
                norms = {"q_norm": of["weight"], "k_norm": k_norm.arguments["weight"], "eps": of["eps"],
                         "gemma": of["gemma"]}  # fmt: skip
            else:
                q, k = (_normed(norm, heads) for norm, heads in zip(self.norms, (q, k)))
        if self.rotation is None or not cos.size(1):
            return q, k
        if not halves:
            q, k = (self.ordered(heads, cos.size(1)) for heads in (q, k))
        if self.rotation == "twins":
            cos, sin = (_apart(table, table.size(1)) for table in (cos, sin))
        with outside():
            return rotary(q, k, cos, sin, **norms)

    def ordered(self, heads: Tensor, rotated: int) -> Tensor:
        """Heads (n, H, D) with their dimensions in the order in which `turn` gives them, `rotated` of them turned."""
        return _apart(heads, rotated) if self.rotation in ("pairs", "twins", "pairs once") else heads

    def rotated(self, table: Tensor) -> int:
        """The dimensions of a head that a table turns."""
        return table.size(1) * (2 if self.rotation is not None and self.rotation.endswith("once") else 1)


def _head_size(attn: Any) -> int | None:
    for name in ("head_dim", "head_size"):
        if isinstance(size := getattr(attn, name, None), int):
            return size
    return None


def _norm_of_heads(module: Any, size: int) -> Any:
    """A norm of queries or keys by its formula, or None."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1:
        return Norm.of(module, weight.numel()) if weight.numel() % size == 0 else None
    if not is_plain(module) or not is_readable(module):
        return None
    each = list(getattr(module, "norms", ()))
    if each:  # of which one has a bias: `HeadsNorm` knows none
        found = [Norm.of(norm, size) for norm in each]
        kinds = {None if norm is None else (norm.kind, eps_of(active(norm.module))) for norm in found}
        plain = len(kinds) == 1 and None not in kinds and found[0].kind == "layer"  # type: ignore[union-attr]
        return HeadsNorm(module) if plain and all(getattr(norm, "bias", None) is None for norm in each) else None
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.size(1) != size:
        return None
    norm = HeadsNorm(module)
    x = torch.randn(4, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    rtol = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.05
    tests = (x, x * eps_of(module) ** 0.5, x + 3)
    return norm if all(torch.allclose(module(x[None])[0], norm(x), rtol=rtol, atol=rtol) for x in tests) else None


def _in_the_op(q_norm: Any, k_norm: Any, size: int) -> bool:
    """Whether `rotary` takes both norms: RMS norms over a head, of one kind and eps."""
    both = isinstance(q_norm, Norm) and q_norm.is_rms and k_norm.like(q_norm)
    return both and q_norm.arguments["weight"].numel() == size == k_norm.arguments["weight"].numel()


def _normed(norm: Any, heads: Tensor) -> Tensor:
    if not heads.size(1):
        return heads
    weight = getattr(active(norm.module), "weight", None)
    if isinstance(norm, HeadsNorm) or weight is None or weight.numel() == heads.size(2):
        return norm(heads)
    return norm(heads.flatten(1)).unflatten(1, heads.shape[1:])  # over all heads in one


def _apart(x: Tensor, rotated: int) -> Tensor:
    """The first `rotated` columns (of the last dimension) as those of even index, then those of odd index."""
    return torch.cat([x[..., 0:rotated:2], x[..., 1:rotated:2], x[..., rotated:]], dim=-1)
