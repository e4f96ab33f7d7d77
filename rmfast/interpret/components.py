"""A model's components as directions in them, and their dots with what comes by while texts run.

A head adds W_O x_h, so its part is the dot of its own output x_h with a *projector* W_Oᵀ(γ⊙w), made once for a layer.
An MLP neuron's is the same with the down projection. Neither is ever an array of (tokens, heads, d). A norm between
projection and stream (Gemma 2 and 3) has its scale frozen as well. All of it is read at the rows that are read, while
texts run as for `score`, packed where that can be; no activation is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rmfast.binding.modules import active, has_hooks, is_readable
from rmfast.binding.norm_map import NormMap
from rmfast.binding.norms import Call, head_arguments, norm_kind
from rmfast.engine.attention import of_rows_read
from rmfast.engine.scorer import Scorer
from rmfast.interpret.frozen_head import FrozenHead, linear_head
from rmfast.ops import reward_head
from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.points import Point
from rmfast.patching.watched import run_watched
from rmfast.texts.inputs import Encoded

# What each component is in the result, in the order of the forward; and what it is a part of.
GIVES = {
    "embedding": ("embedding",),
    "attn_out": ("attn_out",),
    "head_out": ("head_out", "attn_bias"),
    "mlp_out": ("mlp_out",),
    "mlp_neuron": ("mlp_neuron", "mlp_bias"),
}
WHOLE = {"head_out": "attn_out", "mlp_neuron": "mlp_out"}

# Elements of the product of units and projector that are held at once: a core's share of the cache (4,096 tokens of 32
# heads of 64: 9 ms against 55 ms in one piece and 34 ms by einsum); a GPU wants larger launches.
_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_CHUNK_ELEMENTS_ACCELERATOR = 1 << 26


@dataclass(frozen=True)
class _Units:
    """How the heads, or the neurons, of one layer reach the stream: through a projection and the norm behind it."""

    given: Point  # their outputs, given to the projection
    result: Point  # what the projection gives
    projector: Tensor  # (K, units, width)
    bias: Tensor  # (K,), of the projection
    norm: NormMap
    constant: Tensor  # (K,), of the norm


class Components:
    """A model's components as directions in them; made once for any number of texts.

    Args:
        packed: whether a run may be the packed engine's.
    """

    def __init__(
        self, rm: Scorer, names: list[str], norm: Literal["frozen", "raw"], batch_tokens: int | None,
        progress: bool, packed: bool = True,
    ):  # fmt: skip
        self.rm, self.names, self.norm = rm, names, norm
        self.batch_tokens, self.progress = batch_tokens, progress
        linear_head(rm.binding)  # refused before anything runs
        self.patcher = LayersPatcher(rm.binding)
        self.binding = binding = self.patcher.binding
        self.head = FrozenHead.of(binding, norm)
        # Of a head that mixes attributes, each text in its own way, all below is of the attributes, A in place of K.
        self.mixes: bool = binding.program is not None and binding.program.mixes
        self._values = 0  # of a row, by which they are mixed
        for kind in ("attn_out", "mlp_out", *(name for name in names if name in WHOLE)):
            self.patcher.units(kind)
        if (width := self.patcher.units("resid_post")[1]) != binding.width:
            raise ValueError(
                f"Expected layers of {type(binding.root).__name__} whose stream is what its head reads, "
                f"{binding.width} wide, got {width}: what they add to it goes through a projection first"
            )
        self._stored = binding.stream_dtype
        self.direction, self.constant, self.dtype = self.head.direction, self.head.constant, self.head.dtype
        engine = rm.packed_engine() if packed and binding is rm.binding else "padded"
        self.packed = packed
        # Layers that the engine has taken apart: known to add up, and their attention and MLP run as other modules.
        self.fused = [] if isinstance(engine, str) or engine.why else [layer for _, layer in engine.layers]
        with binding.session(grad=True), torch.no_grad():
            self.units = {
                (kind, layer): self._units(kind, layer)
                for kind in names
                if kind in WHOLE
                for layer in range(self.patcher.layers)
            }
        # Of the part of a run that is under way, from the embedding on: by component and layer the dots with the
        # directions, (m, K) or (m, units, K), the final norm's scale left out; the sum of the components, (m, d).
        self._dots: dict[tuple[str, int], Tensor] = {}
        self._sum = torch.empty(0)
        self._bits = 64  # of the least precise component

    def _units(self, kind: str, layer: int) -> _Units:
        point, added = self.patcher.points[layer][kind], self.patcher.points[layer][WHOLE[kind]].module
        held = next(chain(point.module.parameters(), point.module.buffers()), self.direction)
        direction = self.direction.to(self.binding.device if held.is_meta else held.device)
        norm = NormMap()
        if not any(module is point.module for module in added.modules()):
            norm = self._behind(active(added), direction.device)
        units, width = self.patcher.units(kind)
        directions, bias = projector(point.module, norm.fold(direction), units * width, self._stored)
        result = Point(point.module, "out")
        return _Units(point, result, directions.unflatten(-1, (units, width)), bias, norm, norm.constant(direction))

    def _behind(self, module: nn.Module, device: torch.device) -> NormMap:
        """The norm between a projection and the stream."""
        weight: Any = getattr(module, "weight", self.direction)
        noise = torch.randn(1, 4, self.direction.size(-1), generator=torch.Generator().manual_seed(0)).to(weight)
        kind = None if has_hooks(module) else norm_kind(Call("", module, noise, None))
        if kind is None:
            raise ValueError(
                "Expected the norm behind attention or MLP to be an RMS or layer norm with a readable weight and no "
                f"hooks, got {type(module).__name__}; attn_out and mlp_out need none"
            )
        return NormMap.of(self.dtype, **head_arguments(module, kind, device))

    def contributions(self, stream: Tensor, scale: Tensor, rewards: Tensor) -> Tensor:
        """(m, C): rewards, the contributions of the names in their order, each (layers, units, K), and the constant."""

        def layers(name: str) -> Tensor:
            count = 1 if name == "embedding" else self.patcher.layers
            return torch.stack([self._dots[name, layer].to(scale.device) for layer in range(count)], 1)

        columns = [rewards]
        for component in self.names:
            parts = [layers(name) for name in GIVES[component]]
            if component in WHOLE:
                units, bias = parts
                self._check_sum(component, units, bias, layers(WHOLE[component]))
            columns += [part.flatten(1) * scale for part in parts]
        return torch.cat([*columns, self.constant.to(scale).expand(len(scale), -1)], 1)

    # Running ----------------------------------------------------------------------------------------------------------

    def run(
        self,
        texts: list[Encoded],
        rows: list[np.ndarray],
        use: Callable[[Tensor, Tensor, Tensor], Tensor],
        taps: Sequence[tuple[Point, Callable[[Tensor], None]]] = (),
    ) -> list[Tensor]:
        """What `use` makes of the texts' rows, (len(rows[i]), C) each, on the CPU; `taps` see what comes by.

        use: is given, for some rows at a time, the stream (m, d) before the final norm, that norm's scale (m, 1) and
            the rewards (m, K).
        """

        def read(hidden: Tensor, at: Tensor) -> Tensor:
            made = self.binding.row_values if self.mixes else self.binding.rewards
            stream, rewards = hidden.reshape(-1, hidden.size(-1))[at], made(hidden, at)
            self._values = rewards.size(1)
            if not self.fused:
                self._check_stream(stream.to(self._sum))
            scale = self.head.scale(stream)
            return use(stream, scale, rewards.to(scale))

        found = run_watched(
            self.rm, self.binding, [*self._taps(), *taps], texts, rows, read, self.batch_tokens, self.progress,
            self.packed,
        )  # fmt: skip
        return [self._mixed(*values) if self.mixes else values[0] for values in found]

    def _mixed(self, values: Tensor, gates: Tensor | None) -> Tensor:
        """What `contributions` gives of a text's rows for attributes, for its rewards."""
        program = self.binding.program
        own, parts = values.split([self._values, values.size(1) - self._values], 1)
        gate = None if gates is None else gates[:, : self._values]
        mixed = program.mix(parts.unflatten(1, (-1, len(self.constant))), own, gate)
        return torch.cat([program.rewards(own, gate).to(mixed), mixed.flatten(1)], 1)

    def _taps(self) -> Iterator[tuple[Point, Callable[[Tensor], None]]]:
        points, layers = self.patcher.points, range(self.patcher.layers)
        yield points[0]["resid_pre"], self._embedding
        for kind, layer in product(("attn_out", "mlp_out"), layers):
            if not self.fused:
                yield points[layer][kind], partial(self._added, kind, layer, {})
            elif kind in {WHOLE.get(name, name) for name in self.names}:
                module, norm = self.fused[layer].adds(kind)
                head = {} if norm is None else norm.head_arguments(self.direction.device)
                yield Point(module, "out"), partial(self._added, kind, layer, head)
        for (kind, layer), units in self.units.items():
            yield units.given, partial(self._given, kind, layer)
            yield units.result, partial(self._projected, kind, layer)

    def _embedding(self, x: Tensor) -> None:
        x = of_rows_read(x)
        self._dots = {("embedding", 0): reward_head(x, self.direction.to(x.device))}
        self._sum, self._bits = x.to(self.dtype), torch.finfo(x.dtype).bits

    def _added(self, kind: str, layer: int, norm: dict[str, Any], x: Tensor) -> None:
        """What attention or an MLP adds to the stream, or would but for a norm behind it."""
        if (kind, layer) in self._dots:  # a module that has several calls: the first one, as the points are tried
            return
        x = of_rows_read(x)
        self._dots[kind, layer] = reward_head(x, self.direction.to(x.device), **norm)
        self._bits = min(self._bits, torch.finfo(x.dtype).bits)
        if not self.fused:
            self._sum = self._sum + x.to(self._sum)

    def _given(self, kind: str, layer: int, x: Tensor) -> None:
        if (kind, layer) not in self._dots:
            units = self.units[kind, layer]
            self._dots[kind, layer] = unit_dots(units.given.view(of_rows_read(x)[None])[0], units.projector)

    def _projected(self, kind: str, layer: int, x: Tensor) -> None:
        bias = GIVES[kind][1], layer
        if bias not in self._dots:
            units = self.units[kind, layer]
            scale = units.norm.scale(of_rows_read(x).to(self.dtype))
            self._dots[kind, layer] *= scale[..., None]
            self._dots[bias] = units.bias * scale + units.constant

    @property
    def _tolerance(self) -> float:
        # A part that is left out is off by its own size; bf16, in many layers, by a few percent.
        return 1e-3 if self._bits >= 32 else 0.1

    def _check_stream(self, stream: Tensor) -> None:
        if (self._sum - stream).norm() > self._tolerance * stream.norm():  # NaN tells nothing
            raise ValueError(
                "Expected layers that add their attention and MLP to the residual stream, so that the reward is a sum "
                f"over them; those of {type(self.binding.root).__name__} ({type(self.patcher.modules[0]).__name__}) do "
                "not: they normalise the sum, or have other parts"
            )

    def _check_sum(self, kind: str, units: Tensor, bias: Tensor, whole: Tensor) -> None:
        """Of (m, L, units, K), (m, L, K) and (m, L, K)."""
        error = (units.sum(2) + bias - whole).norm()
        if whole.isfinite().all() and not error <= self._tolerance * max(units.norm(), whole.norm()):
            raise ValueError(
                f"Expected {kind} to make {WHOLE[kind]} through a linear map and a norm behind it alone; behind the "
                f"{type(self.units[kind, 0].given.module).__name__} of {type(self.patcher.modules[0]).__name__}, or in "
                "its hooks, there is more"
            )


def projector(
    module: nn.Module, directions: Tensor, columns: int, stored: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Directions (K, d) in what a linear module gives as (K, columns) in what it is given, and its bias there (K,).

    By the module's own forward and its gradient, so that Linear, GPT-2's Conv1D and adapters (LoRA) are all alike; in
    the directions' dtype, but where the weights are quantised or offloaded and can only be run as they are.
    """
    weights, dtype = {}, stored
    if is_readable(module) and all(x.is_floating_point() for x in chain(module.parameters(), module.buffers())):
        dtype = directions.dtype  # a copy of weights made in inference mode, which autograd may not save
        weights = {name: p.detach().to(dtype, copy=p.is_inference()) for name, p in module.named_parameters()}
    x = directions.new_zeros(1, len(directions), columns, dtype=dtype).requires_grad_()
    with torch.enable_grad():
        out = torch.func.functional_call(module, weights, (x,))
    (grad,) = torch.autograd.grad(out, x, directions.to(out)[None])
    return grad[0].to(directions), directions @ out[0, 0].detach().to(directions)


def unit_dots(x: Tensor, projector: Tensor) -> Tensor:
    """(n, units, width) and (K, units, width) -> (n, units, K), some rows at a time."""
    projector = projector.to(x.device)
    out = projector.new_empty(*x.shape[:2], len(projector))
    elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_ACCELERATOR)
    rows = max(1, elements // projector[0].numel())
    for some, into in zip(x.split(rows), out.split(rows)):
        for k, directions in enumerate(projector):
            torch.sum(some * directions, -1, out=into[..., k])
    return out
