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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rmfast.arguments import instance, whole, word
from rmfast.arguments import words as words_of
from rmfast.engine.scorer import Scorer
from rmfast.interpret.components import GIVES, WHOLE, Components
from rmfast.patching.grid import PatchSweep
from rmfast.patching.sites import UNITS
from rmfast.plots import axes, figure_size, heat_map, needed, shown_figure
from rmfast.texts.inputs import Encoded, several, words

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
        rewards: ([T] + [K]), the model's own.
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

    def _repr_html_(self) -> str:
        """For notebooks: `plot`; at every token that of the component which was asked for last."""
        last = WHOLE.get(name := next(reversed(self.contributions)), name.replace("_bias", "_out"))
        return shown_figure(lambda: self.plot(last if self._every else None), repr(self))

    @property
    def _every(self) -> bool:
        return any("position" in axes for axes in self.axes.values())

    @property
    def total(self) -> Tensor:
        """([T] + [K]): the constant and all contributions that were asked for.

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
        wholes = {WHOLE[name]: name for name in self.contributions if name in WHOLE}
        word("component", component, [*self.contributions, *wholes])
        if component in self.contributions:
            return self.contributions[component]
        units = wholes[component]
        x, bias = (self.contributions[name] for name in GIVES[units])
        return (x.double().sum(self.axes[units].index(UNITS[units])) + bias.double()).to(x.dtype)

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
        whole("label", label, 0, self.constant.numel() - 1)
        if component is None and self._every:
            raise ValueError(f"Expected a component to draw at every token: {', '.join(self.contributions)}")
        if component is None:
            return self._bars(axes(ax, 8, 3.5), label)
        self.of(component)  # refused by name where it is none
        grid = self._values(WHOLE.get(component, component) if self._every else component, label)
        grid = grid.reshape(1 if component == "embedding" else len(grid), -1)
        words = [f"{i} {token!r}" for i, token in enumerate(self.tokens)]
        columns = words if self._every else list(map(str, range(grid.shape[1])))
        ax = axes(ax, *figure_size(*grid.shape))
        heat_map(ax, grid, list(map(str, range(len(grid)))), columns, f"contribution, norm {self.norm}")
        ax.set_xlabel("token" if self._every else UNITS.get(component, ""))
        ax.set_title(component)
        return ax

    def _bars(self, ax: Any, label: int) -> Any:
        there = {WHOLE.get(name, name) for name in self.contributions}
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
        instance("sweep", sweep, PatchSweep)
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
    rm: Scorer,
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
    rm.expect_clamps_alone(("all",))
    named = words_of("components", components, GIVES)
    for units, both in WHOLE.items():
        if units in named and both in named:
            raise ValueError(f"Expected components with {both} or {units}, which it is the sum of, got both")
    word("positions", positions, ("last", "all"))
    word("norm", norm, ("frozen", "raw"))
    many = several(inputs)
    texts = rm.encode(inputs if many else [inputs], **encoding)
    parts = Components(rm, [name for name in GIVES if name in named], norm, batch_tokens, progress)
    results = _attributions(parts, texts, positions == "all")
    return results if many else results[0]


def _attributions(parts: Components, texts: list[Encoded], every: bool) -> list[Attribution]:
    read = parts.rm.positions(texts)
    rows = [np.arange(len(text)) if every else np.array([at]) for text, at in zip(texts, read)]
    # Layers and units of each token's numbers by name, None where there is one for all.
    sizes: dict[str, tuple[int | None, int | None]] = {}
    for name in parts.names:
        layers = None if name == "embedding" else parts.patcher.layers
        sizes |= dict.fromkeys(GIVES[name], (layers, None))
        if name in WHOLE:
            sizes[name] = layers, parts.patcher.units(name)[0]
    labels = parts.rm.num_labels
    counts = [labels * (layers or 1) * (units or 1) for layers, units in sizes.values()]
    most_each = sum(counts) * len(parts.constant) // labels
    ends = np.cumsum([len(at) * most_each for at in rows])  # numbers of the texts up to each
    found: list[Attribution] = []
    while (first := len(found)) < len(texts):
        # All neurons of all tokens are many numbers: some texts at a time.
        most = _NUMBERS + (ends[first - 1] if first else 0)
        some = slice(first, max(first + 1, int(np.searchsorted(ends, most, side="right"))))
        values = parts.run(texts[some], rows[some], parts.contributions)
        for text, at, each in zip(texts[some], read[some], values):
            rewards, *pieces, constants = each.split([labels, *counts, labels], 1)
            if parts.mixes and not torch.allclose(constants, constants[:1], atol=1e-6):
                kind = parts.binding.program.kind
                raise ValueError(f'Expected positions="last": the constant of {kind} differs from token to token')
            constant = _result(constants[:1], labels, False)[0]
            results = {
                name: _result(part, labels, every, *size, unit=UNITS.get(name))
                for (name, size), part in zip(sizes.items(), pieces, strict=True)
            }
            found.append(
                Attribution(
                    contributions={name: x for name, (x, _) in results.items()},
                    axes={name: axes for name, (_, axes) in results.items()},
                    constant=constant,
                    rewards=_result(rewards, labels, every)[0],
                    norm=parts.norm,
                    read=at,
                    tokens=words(parts.rm.tokenizer, text.ids.tolist()),
                    token_ids=text.ids.tolist(),
                )
            )
    return found


def _result(
    values: Tensor,
    labels: int,
    every: bool,
    layers: int | None = None,
    units: int | None = None,
    unit: str | None = None,
) -> tuple[Tensor, tuple[str, ...]]:
    """(n, layers · units · K) as a result's tensor, and the names of its axes."""
    x = values.unflatten(1, (layers or 1, units or 1, -1)).transpose(0, 1)
    names = (layers and "layer", every and "position", units and unit, labels > 1 and "label")
    # A copy: a view would keep the numbers of all texts.
    x = x.squeeze([i for i, name in enumerate(names) if not name]).clone(memory_format=torch.contiguous_format)
    return x, tuple(name for name in names if name)  # type: ignore[misc]
