"""Direct attribution: what every component of a model adds to its reward.

The stream h_L that the final norm and the head w read is a sum: the embedding, and what attention and MLP of each layer
add to it. With the norm's scale s frozen at what it is on the whole stream, the reward is the sum of their parts:

    reward = Σ_c s · (γ⊙w)·o_c + b      s = 1 / rms(h_L); 1 + γ for Gemma
    layer norm: the same with each o_c less its own mean, s = 1 / σ(h_L), and β·w + b as the constant

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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rmfast import model as _model
from rmfast.engine import of_rows_read
from rmfast.grids import PatchSweep, figure_size, heat_map, needed
from rmfast.hooks import LayersPatcher, Point
from rmfast.inputs import Encoded, several, words
from rmfast.kernels.reward_head.reference import LAYER, NONE, NORMS, fold_bias, fold_gain
from rmfast.ops import reward_head
from rmfast.sites import UNITS

if TYPE_CHECKING:
    from rmfast.scoring import RewardModel

__all__ = ["Attribution", "attribute"]

# What each component is in the result, in the order of the forward; and what it is a part of.
_GIVES = {
    "embedding": ("embedding",),
    "attn_out": ("attn_out",),
    "head_out": ("head_out", "attn_bias"),
    "mlp_out": ("mlp_out",),
    "mlp_neuron": ("mlp_neuron", "mlp_bias"),
}
_WHOLE = {"head_out": "attn_out", "mlp_neuron": "mlp_out"}

# Elements of the product of units and projector that are held at once: a core's share of the cache (4,096 tokens of 32
# heads of 64: 9 ms against 55 ms in one piece and 34 ms by einsum); a GPU wants larger launches.
_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_CHUNK_ELEMENTS_ACCELERATOR = 1 << 26
_NUMBERS = 1 << 26  # contributions of one run at most, but for one text: 256 MiB


@dataclass(eq=False, repr=False, kw_only=True)
class Attribution:
    """The reward of one text as a sum over components, at the token where it is read or at every token.

    Attributes:
        contributions: by component, those that were asked for: "embedding", "attn_out" or "head_out" and "attn_bias",
            "mlp_out" or "mlp_neuron" and "mlp_bias". CPU, fp32 (fp64 for an fp64 model). The biases are those of the
            output and the down projection, 0 where there is none.
        axes: for each of them the names of its dimensions: "layer" (but for the embedding), "position" (where every
            token is read), "head" or "neuron", "label" (for K > 1).
        constant: () or (K,), what belongs to no component: the head's bias, and a final layer norm's β·w.
        rewards: ([T,] [K]), the model's own.
        norm: "frozen", or "raw" for contributions that leave the final norm out.
        read: the token where the reward is read.
        tokens, token_ids: of the text.
    """

    contributions: dict[str, Tensor]
    axes: dict[str, tuple[str, ...]]
    constant: Tensor
    rewards: Tensor
    norm: str
    read: int
    tokens: list[str]
    token_ids: list[int]

    def __repr__(self) -> str:
        at = "every token" if self._every else f"token {self.read} {self.tokens[self.read]!r}"
        parts = ", ".join(f"{name} {' × '.join(map(str, x.shape))}".rstrip() for name, x in self.contributions.items())
        return f"Attribution(norm {self.norm!r}, at {at} of {len(self.tokens)}, {parts})"

    @property
    def _every(self) -> bool:
        return any("position" in axes for axes in self.axes.values())

    @property
    def total(self) -> Tensor:
        """([T,] [K]): the constant and all contributions that were asked for.

        With embedding, attention and MLPs among them it is the reward for norm="frozen"; for norm="raw" it is
        w·h_L + b, which is not.
        """
        total = self.constant.double()
        for name, x in self.contributions.items():
            summed = [i for i, axis in enumerate(self.axes[name]) if axis not in ("position", "label")]
            total = total + (x.double().sum(summed) if summed else x.double())
        return total.to(self.constant.dtype)

    def of(self, component: str) -> Tensor:
        """The contributions of a component; of "attn_out" and "mlp_out" also where they are there as heads or neurons.

        Raises:
            ValueError: the component was not asked for.
        """
        if component in self.contributions:
            return self.contributions[component]
        for units, whole in _WHOLE.items():
            if component == whole and units in self.contributions:
                x, bias = (self.contributions[name] for name in _GIVES[units])
                return (x.double().sum(self.axes[units].index(UNITS[units])) + bias.double()).to(x.dtype)
        raise ValueError(f"Expected a component among {', '.join(self.contributions)}, got {component!r}")

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each contribution: component, coordinates (empty where it has none), token
        (the one that is read, where there is no position) and contribution.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = needed("pandas", "to_dataframe")
        frames = []
        for name, x in self.contributions.items():
            index = np.indices(tuple(x.shape)).reshape(x.dim(), x.numel())
            columns = {axis: pandas.array(at, dtype="Int64") for axis, at in zip(self.axes[name], index)}
            at = index[self.axes[name].index("position")] if "position" in columns else np.full(x.numel(), self.read)
            token = np.array(self.tokens, object)[at]
            frames.append(
                pandas.DataFrame({"component": name, **columns, "token": token, "contribution": x.ravel().numpy()})
            )
        table = pandas.concat(frames, ignore_index=True)
        order = ["component", "layer", "position", "head", "neuron", "label", "token", "contribution"]
        return table[[name for name in order if name in table]]

    def plot(self, component: str | None = None, *, label: int = 0, ax: Any = None) -> Any:
        """Contributions by layer.

        Without a component: bars of attention and MLP in each layer, and of the embedding (at the read token). Of one:
        a map of layers by heads or neurons; at every token by positions, units summed.

        Args:
            component: one of `contributions`, or "attn_out" or "mlp_out" where their units are there.
            label: which reward of K.
            ax: the matplotlib Axes to draw on; default: a new figure.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the component was not asked for; none is given, at every token.
        """
        pyplot = needed("matplotlib.pyplot", "plot")
        if component is None and self._every:
            raise ValueError(f"Expected a component to draw at every token: {', '.join(self.contributions)}")
        if component is None:
            ax = pyplot.subplots(figsize=(8, 3.5), layout="constrained")[1] if ax is None else ax
            return self._bars(ax, label)
        grid = self._values(_WHOLE.get(component, component) if self._every else component, label)
        grid = grid.reshape(1 if component == "embedding" else len(grid), -1)
        words = [f"{i} {token!r}" for i, token in enumerate(self.tokens)]
        columns = words if self._every else list(map(str, range(grid.shape[1])))
        ax = pyplot.subplots(figsize=figure_size(*grid.shape), layout="constrained")[1] if ax is None else ax
        heat_map(ax, grid, list(map(str, range(len(grid)))), columns, f"contribution, norm {self.norm}")
        ax.set_xlabel("token" if self._every else UNITS.get(component, ""))
        ax.set_title(component)
        return ax

    def _bars(self, ax: Any, label: int) -> Any:
        there = {_WHOLE.get(name, name) for name in self.contributions}
        for offset, name in ((-0.2, "attn_out"), (0.2, "mlp_out")):
            if name in there:
                each = self._values(name, label)
                ax.bar(np.arange(len(each)) + offset, each, width=0.4, label=name)
        if "embedding" in there:
            ax.bar([-1], self._values("embedding", label), width=0.4, label="embedding")
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.set_xlabel(f"layer (at token {self.read} {self.tokens[self.read]!r})")
        ax.set_ylabel(f"contribution, norm {self.norm}")
        ax.legend()
        return ax

    def _values(self, component: str, label: int) -> np.ndarray:
        x = self.of(component)
        return (x[..., label] if self.constant.dim() else x).double().numpy()

    def like(self, sweep: PatchSweep) -> Tensor:
        """Contributions at the read token in the layout of a sweep's `rewards`, to hold against its `effect`.

        Does attribution predict patching? For a pair, the difference of both texts' contributions beside what patching
        the same components, at all positions jointly, does.

        Raises:
            ValueError: this attribution is of every token, or lacks a kind that was swept; the grid has several
                positions, kinds of different units, or a metric's numbers in place of the labels.
        """
        if self._every:
            raise ValueError('Expected an attribution at the read token (positions="last"), got one at every token')
        if len(sweep.coords["position"]) != 1 or "unit" in sweep.coords:
            raise ValueError(
                'Expected a sweep of one group of positions (positions="joint") and of kinds with the same units, got '
                f"axes {', '.join(sweep.axes)}, positions {len(sweep.coords['position'])}"
            )
        if ("label" in sweep.coords) != (self.constant.dim() == 1):
            raise ValueError(f"Expected a sweep of the rewards themselves, {self.constant.numel()}, without metric")
        grid = torch.stack([self.of(site)[sweep.coords["layer"]] for site in sweep.coords["site"]])
        for axis in ("head", "neuron"):
            grid = grid[:, :, sweep.coords[axis]] if axis in sweep.coords else grid
        grid = grid[..., sweep.coords["label"]] if "label" in sweep.coords else grid
        return grid.reshape(sweep.rewards.shape)


def attribute(
    rm: RewardModel,
    inputs: Any,
    *,
    components: str | Sequence[str] = ("embedding", "attn_out", "mlp_out"),
    positions: Literal["last", "all"] = "last",
    norm: Literal["frozen", "raw"] = "frozen",
    batch_tokens: int | None = None,
    progress: bool = False,
    **encoding: Any,
) -> Attribution | list[Attribution]:
    """See `RewardModel.attribute`."""
    named = [components] if isinstance(components, str) else list(components)
    if not named or len(set(named)) < len(named) or not set(named) <= set(_GIVES):
        raise ValueError(f"Expected components to be different ones of {', '.join(_GIVES)}, got {components!r}")
    for units, whole in _WHOLE.items():
        if units in named and whole in named:
            raise ValueError(f"Expected components with {whole} or {units}, which it is the sum of, got both")
    for name, value, known in (("positions", positions, ("last", "all")), ("norm", norm, ("frozen", "raw"))):
        if value not in known:
            raise ValueError(f'Expected {name} to be "{known[0]}" or "{known[1]}", got {value!r}')
    many = several(inputs)
    texts = rm.encode(list(inputs) if many else [inputs], **encoding)
    parts = _Parts(rm, [name for name in _GIVES if name in named], norm, batch_tokens, progress)
    results = parts.attributions(texts, positions == "all")
    return results if many else results[0]


@dataclass(frozen=True)
class _Norm:
    """A norm as a linear map: for a row x it is scale(x) times that map, and a constant."""

    kind: int = NONE
    gain: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0

    @classmethod
    def of(
        cls, dtype: torch.dtype, norm: str | None, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
        eps: float = 0.0,
    ) -> _Norm:  # fmt: skip
        """From `reward_head`'s arguments."""
        gain, bias = (None if x is None else x.detach().to(dtype) for x in (norm_weight, norm_bias))
        return cls(NORMS[norm], gain, bias, eps)

    def back(self, directions: Tensor) -> Tensor:
        """Directions (K, d) of what it gives, as directions of what it is given, but for the scale."""
        directions = fold_gain(directions, self.kind, self.gain)
        return directions - directions.mean(-1, keepdim=True) if self.kind == LAYER else directions

    def constant(self, directions: Tensor, bias: Tensor | None = None) -> Tensor:
        """(K,): what its own bias adds along the directions, and theirs."""
        return fold_bias(directions, bias, self.kind, self.bias)

    def scale(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, d) -> (n, 1) in dtype."""
        if self.kind == NONE:
            return x.new_ones(x.size(0), 1, dtype=dtype)
        x = x.to(dtype)
        x = x - x.mean(-1, keepdim=True) if self.kind == LAYER else x
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


@dataclass(frozen=True)
class FrozenHead:
    """The final norm and a linear head as a linear map of the stream h, the norm's scale frozen at some h_L:

        reward = scale(h_L) · direction·h + constant, for any part h of h_L; for h = h_L the model's own

    Directions that the model loses before or after the norm (`Binding.before`, `after`) are taken from `direction`.

    Attributes:
        norm: the final norm; one that does nothing for norm="raw", whose scale is 1.
        direction: (K, d), γ⊙w, less its own mean for a layer norm: h need not be centred.
        constant: (K,), the head's bias and β·w.
        dtype: of them and of `scale`: fp32, fp64 for an fp64 model.
        before: what h loses before the norm's scale is taken.
    """

    norm: _Norm
    direction: Tensor
    constant: Tensor
    dtype: torch.dtype
    before: _model.Removal | None

    @classmethod
    def of(cls, binding: _model.Binding, norm: Literal["frozen", "raw"]) -> FrozenHead:
        """Reads the model's weights as they are now.

        Raises:
            ValueError: the head is not a single readable nn.Linear, or the norm is of no known kind or hooked.
        """
        linear = _linear(binding)
        check_norm(binding, norm)
        stored = next(p.dtype for p in binding.root.parameters() if p.is_floating_point())
        dtype = torch.float64 if stored == torch.float64 else torch.float32
        with binding.session(grad=True), torch.no_grad():
            weight, bias = (None if x is None else x.detach().to(dtype) for x in (linear.weight, linear.bias))
            assert weight is not None
            weight = weight if binding.after is None else binding.after.of(weight)
            given = binding.norm_arguments(weight.device) if norm == "frozen" else {"norm": None}
            final = _Norm.of(dtype, **given)
            direction = final.back(weight)
            direction = direction if binding.before is None else binding.before.of(direction)  # a symmetric map
            return cls(final, direction, final.constant(weight, bias), dtype, binding.before)

    def scale(self, stream: Tensor) -> Tensor:
        """(n, d) -> (n, 1), the norm's scale on these streams."""
        stream = stream if self.before is None else self.before.of(stream)
        return self.norm.scale(stream, self.dtype)


@dataclass(frozen=True)
class _Units:
    """How the heads, or the neurons, of one layer reach the stream: through a projection and the norm behind it."""

    given: Point  # their outputs, given to the projection
    result: Point  # what the projection gives
    projector: Tensor  # (K, units, width)
    bias: Tensor  # (K,), of the projection
    norm: _Norm
    constant: Tensor  # (K,), of the norm


class _Parts:
    """A model's components as directions in them; made once for any number of texts.

    Args:
        packed: whether a run may be the packed engine's.
    """

    def __init__(
        self, rm: RewardModel, names: list[str], norm: Literal["frozen", "raw"], batch_tokens: int | None,
        progress: bool, packed: bool = True,
    ):  # fmt: skip
        self.rm, self.names, self.norm = rm, names, norm
        self.batch_tokens, self.progress = batch_tokens, progress
        _linear(rm.binding)  # refused before anything runs
        self.patcher = LayersPatcher(rm.binding)
        self.binding = binding = self.patcher.binding
        self.head = FrozenHead.of(binding, norm)
        for kind in {"attn_out", "mlp_out", *(name for name in names if name in _WHOLE)}:
            self.patcher.units(kind)
        self._stored = next(p.dtype for p in binding.root.parameters() if p.is_floating_point())
        self.direction, self.constant, self.dtype = self.head.direction, self.head.constant, self.head.dtype
        engine = rm._packed_engine() if packed and binding is rm.binding else "padded"
        self.packed = packed
        # Layers that the engine has taken apart: known to add up, and their attention and MLP run as other modules.
        self.fused = [] if isinstance(engine, str) or engine.why else [layer for _, layer in engine.layers]
        with binding.session(grad=True), torch.no_grad():
            self.units = {
                (kind, layer): self._units(kind, layer)
                for kind in names
                if kind in _WHOLE
                for layer in range(self.patcher.layers)
            }
        # Of the part of a run that is under way, from the embedding on: by component and layer the dots with the
        # directions, (m, K) or (m, units, K), the final norm's scale left out; the sum of the components, (m, d).
        self._dots: dict[tuple[str, int], Tensor] = {}
        self._sum = torch.empty(0)
        self._bits = 64  # of the least precise component

    def _units(self, kind: str, layer: int) -> _Units:
        point, added = self.patcher.points[layer][kind], self.patcher.points[layer][_WHOLE[kind]].module
        held = next(chain(point.module.parameters(), point.module.buffers()), self.direction)
        direction = self.direction.to(self.binding.device if held.is_meta else held.device)
        norm = _Norm()
        if not any(module is point.module for module in added.modules()):
            norm = self._behind(_model.active(added), direction.device)
        units, width = self.patcher.units(kind)
        directions, bias = projector(point.module, norm.back(direction), units * width, self._stored)
        result = Point(point.module, "out")
        return _Units(point, result, directions.unflatten(-1, (units, width)), bias, norm, norm.constant(direction))

    def _behind(self, module: nn.Module, device: torch.device) -> _Norm:
        """The norm between a projection and the stream."""
        weight: Any = getattr(module, "weight", self.direction)
        noise = torch.randn(1, 4, self.direction.size(-1), generator=torch.Generator().manual_seed(0)).to(weight)
        kind = None if _model._hooked(module) else _model._norm_kind(_model.Call("", module, noise, None))
        if kind is None:
            raise ValueError(
                "Expected the norm behind attention or MLP to be an RMS or layer norm with a readable weight and no "
                f"hooks, got {type(module).__name__}; attn_out and mlp_out need none"
            )
        gain, bias = (
            None if x is None else x.to(device) for x in (_model._gain(module), getattr(module, "bias", None))
        )
        return _Norm.of(self.dtype, kind, gain, bias, _model._eps(module))

    # Results ----------------------------------------------------------------------------------------------------------

    def attributions(self, texts: list[Encoded], every: bool) -> list[Attribution]:
        read = [self.rm._position(text.ids, i, None) for i, text in enumerate(texts)]
        rows = [np.arange(len(text)) if every else np.array([at]) for text, at in zip(texts, read)]
        # Layers and units of each token's numbers by name, None where there is one for all.
        sizes: dict[str, tuple[int | None, int | None]] = {}
        for name in self.names:
            layers = None if name == "embedding" else self.patcher.layers
            sizes |= dict.fromkeys(_GIVES[name], (layers, None))
            if name in _WHOLE:
                sizes[name] = layers, self.patcher.units(name)[0]
        labels = len(self.constant)
        counts = [labels * (layers or 1) * (units or 1) for layers, units in sizes.values()]
        constant = self._result(self.constant[None], False)[0].cpu()
        ends = np.cumsum([len(at) * sum(counts) for at in rows])  # numbers of the texts up to each
        found: list[Attribution] = []
        while (first := len(found)) < len(texts):
            # All neurons of all tokens are many numbers: some texts at a time.
            most = _NUMBERS + (ends[first - 1] if first else 0)
            some = slice(first, max(first + 1, int(np.searchsorted(ends, most, side="right"))))
            values = self.run(texts[some], rows[some], self._contributions)
            for text, at, each in zip(texts[some], read[some], values):
                rewards, *parts = each.split([labels, *counts], 1)
                results = {
                    name: self._result(part, every, *size, unit=UNITS.get(name))
                    for (name, size), part in zip(sizes.items(), parts, strict=True)
                }
                found.append(
                    Attribution(
                        contributions={name: x for name, (x, _) in results.items()},
                        axes={name: axes for name, (_, axes) in results.items()},
                        constant=constant.clone(),
                        rewards=self._result(rewards, every)[0],
                        norm=self.norm,
                        read=at,
                        tokens=words(self.rm.tokenizer, text.ids.tolist()),
                        token_ids=text.ids.tolist(),
                    )
                )
        return found

    def _result(
        self, values: Tensor, every: bool, layers: int | None = None, units: int | None = None, unit: str | None = None
    ) -> tuple[Tensor, tuple[str, ...]]:
        """(n, layers · units · K) as a result's tensor, and the names of its axes."""
        x = values.unflatten(1, (layers or 1, units or 1, -1)).transpose(0, 1)
        names = (layers and "layer", every and "position", units and unit, len(self.constant) > 1 and "label")
        # A copy: a view would keep the numbers of all texts.
        x = x.squeeze([i for i, name in enumerate(names) if not name]).clone(memory_format=torch.contiguous_format)
        return x, tuple(name for name in names if name)  # type: ignore[misc]

    def _contributions(self, stream: Tensor, scale: Tensor, rewards: Tensor) -> Tensor:
        """(m, C): rewards, and the contributions of the names in their order, each (layers, units, K)."""

        def layers(name: str) -> Tensor:
            count = 1 if name == "embedding" else self.patcher.layers
            return torch.stack([self._dots[name, layer].to(scale.device) for layer in range(count)], 1)

        columns = [rewards]
        for component in self.names:
            parts = [layers(name) for name in _GIVES[component]]
            if component in _WHOLE:
                units, bias = parts
                self._check_sum(component, units, bias, layers(_WHOLE[component]))
            columns += [part.flatten(1) * scale for part in parts]
        return torch.cat(columns, 1)

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
            stream, rewards = hidden.reshape(-1, hidden.size(-1))[at], self.binding.rewards(hidden, at)
            if not self.fused:
                self._check_stream(stream.to(self._sum))
            scale = self.head.scale(stream)
            return use(stream, scale, rewards.to(scale))

        return self.rm._run_watched(
            self.binding, [*self._taps(), *taps], texts, rows, read, self.batch_tokens, self.progress, self.packed
        )

    def _taps(self) -> Iterator[tuple[Point, Callable[[Tensor], None]]]:
        points, layers = self.patcher.points, range(self.patcher.layers)
        yield points[0]["resid_pre"], self._embedding
        for kind, layer in product(("attn_out", "mlp_out"), layers):
            if not self.fused:
                yield points[layer][kind], partial(self._added, kind, layer, {})
            elif kind in {_WHOLE.get(name, name) for name in self.names}:
                module, norm = self.fused[layer].adds(kind)
                head = {}
                if norm is not None:
                    head = {"norm": norm.kind, "norm_weight": norm.module.weight, "eps": _model._eps(norm.module)}
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
        bias = _GIVES[kind][1], layer
        if bias not in self._dots:
            units = self.units[kind, layer]
            scale = units.norm.scale(of_rows_read(x), self.dtype)
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
                f"Expected {kind} to make {_WHOLE[kind]} through a linear map and a norm behind it alone; behind the "
                f"{type(self.units[kind, 0].given.module).__name__} of {type(self.patcher.modules[0]).__name__}, or in "
                "its hooks, there is more"
            )


def _linear(binding: _model.Binding) -> nn.Linear:
    name = type(binding.root).__name__
    if not binding.head:
        raise ValueError(f"{name} pools by itself: expected a head that reads one token's stream, a single nn.Linear")
    linear = _model.plain_linear(binding.head)
    if linear is None:
        found = ", ".join(type(_model.active(module)).__name__ for module in binding.head)
        raise ValueError(
            f"Expected the head of {name} to be a single nn.Linear with a readable weight and no hooks, so that the "
            f"reward is linear in the stream but for its norm, got {found}"
        )
    return linear


def check_norm(binding: _model.Binding, norm: str) -> None:
    """ValueError for a final norm with hooks, which then can't be left out, or (norm="frozen") of no known kind."""
    if binding.norm is None:
        return
    kind = type(_model.active(binding.norm)).__name__
    if not binding.leaves_norm_out:
        raise ValueError(f"Expected the body and its final norm ({kind}) to be without hooks")
    if norm == "frozen" and (binding.norm_kind is None or not _model._readable(_model.active(binding.norm))):
        raise ValueError(
            f'Expected the final norm to be an RMS or layer norm with a readable weight, or norm="raw", got {kind}'
        )


def projector(
    module: nn.Module, directions: Tensor, columns: int, stored: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Directions (K, d) in what a linear module gives as (K, columns) in what it is given, and its bias there (K,).

    By the module's own forward and its gradient, so that Linear, GPT-2's Conv1D and adapters (LoRA) are all alike; in
    the directions' dtype, but where the weights are quantised or offloaded and can only be run as they are.
    """
    weights, dtype = {}, stored
    if _model._readable(module) and all(x.is_floating_point() for x in chain(module.parameters(), module.buffers())):
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
