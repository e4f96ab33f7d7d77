"""Decoder layers taken apart, by structure and formula: serial or parallel, with norms before or behind their blocks.

Their token-wise parts are fused ops, and the last layer computes queries, output and MLP only for rows that are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.modules import active, settings_of
from rmfast.engine.attention import Run, current_run
from rmfast.engine.heads import Heads
from rmfast.engine.mlps import Mlp, function_of
from rmfast.engine.norms import Norm


@dataclass
class Layer:
    """One decoder layer, by structure; calling it is its forward on (1, n, d), and its parts take (n, ...) rows.

    Attributes:
        attn, mlp: the modules; where the MLP's parts lie in the layer itself (OPT), mlp is that.
        projections: how attention makes its heads.
        inner: the MLP by its parts, or None: it runs as the module that it is.
        before_attn, after_attn, before_mlp, after_mlp: its norms; of a parallel layer with one norm it is both the
            first and the third.
        parallel: whether the MLP reads the stream that enters the layer.
        sines_first: whether its attention is given sin and cos, and not cos and sin (GPT-J since transformers 5.24).
        last: whether it is the body's last.
        beside: how many things its own forward gives beside the stream, in a tuple (Falcon); None: a tensor.
        keeps_rows: whether the last one must give as many rows as it is given, those that are read first: the body
            has a shape in mind (GPT-2).
        narrow: the dtype of what its blocks read, where the stream is fp32 beside it; None: that of the stream.
        width: d.
        neuron_count: inner activations of the MLP, where it is known by its parts.
        options: scale, softcap and window, as the module itself gives them.
    """

    attn: Any
    mlp: Any
    projections: Heads
    inner: Mlp | None
    before_attn: Norm | None = None
    after_attn: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    parallel: bool = False
    sines_first: bool = False
    last: bool = False
    beside: int | None = None
    keeps_rows: bool = False
    narrow: torch.dtype | None = None
    width: int = 0
    neuron_count: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def norms(self) -> list[Norm]:
        return [n for n in (self.before_attn, self.after_attn, self.before_mlp, self.after_mlp) if n is not None]

    @property
    def sandwich(self) -> bool:
        """Whether a norm stands between a block and the stream."""
        return self.after_attn is not None or self.after_mlp is not None

    @property
    def activation(self) -> str | None:
        return None if self.inner is None else self.inner.activation

    @property
    def o_proj(self) -> Any:
        return self.projections.o_proj

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = current_run.get()
        assert run is not None
        y, x = self.enter(self.widened(hidden_states[0]), run.delta)
        x, run.delta = self.rows(run, y, x, *self.tables(hidden_states, kwargs))
        if self.last:
            x, run.delta = x + run.delta, None
        if self.keeps_rows and len(x) < hidden_states.size(1):
            few, x = x, x.new_empty(hidden_states.size(1), x.size(1))
            x[: len(few)] = few
        return self.returned(x)

    def moved(self, copies: Mapping[nn.Module, nn.Module]) -> Layer:
        """The same layer made of copies of its modules."""

        def norm(of: Norm | None) -> Norm | None:
            return None if of is None else Norm(copies[of.module], of.kind)

        return replace(
            self, attn=copies[self.attn], mlp=copies[self.mlp], projections=self.projections.moved(copies),
            inner=None if self.inner is None else self.inner.moved(copies),
            before_attn=norm(self.before_attn), after_attn=norm(self.after_attn),
            before_mlp=norm(self.before_mlp), after_mlp=norm(self.after_mlp),
        )  # fmt: skip

    def tables(self, hidden_states: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """cos and sin (n, R) for rows of what the layer is given by name; of no columns where it gets none.

        Raises:
            ValueError: it gets none, and turns its heads.
        """
        if (tables := given.get("position_embeddings")) is not None:
            cos, sin = reversed(tables) if self.sines_first else tables
            return cos[0], sin[0]
        if (table := getattr(self.attn, "embed_positions", None)) is not None:  # GPT-J: sines, then cosines
            sin, cos = table[given["position_ids"][0]].to(hidden_states.device).chunk(2, dim=-1)
            return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        if self.projections.rotation is not None:
            raise ValueError("Expected a layer whose heads are turned to be given position_embeddings, got none")
        none = hidden_states.new_empty(hidden_states.size(1), 0)
        return none, none

    def returned(self, x: Tensor) -> Any:
        """Rows in the form in which its own forward gives them."""
        return x[None] if self.beside is None else (x[None], *[None] * self.beside)

    def widened(self, x: Tensor) -> Tensor:
        """Rows as the stream holds them: what the first layer is given is as the embedding made it."""
        return x if self.narrow is None else x.float()

    def _narrowed(self, y: Tensor) -> Tensor:
        """Rows as linear layers take them."""
        return y if self.narrow is None else y.to(self.narrow)

    def enter(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """What attention reads and the stream, from the stream and what is yet to be added to it."""
        if self.before_attn is None:
            x = x if delta is None else x + delta
            return x, x
        return (self.before_attn(x), x) if delta is None else self.before_attn(delta, x)

    def rows(self, run: Run, y: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The stream and what the MLP has yet to add to it; in the last layer at the run's read rows."""
        read = run.read_rows if self.last else None
        q, k, v = self.heads(y, cos, sin, read)
        return self.after_heads(run, q, k, v, x if read is None else x[read])

    def heads(self, y: Tensor, cos: Tensor, sin: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (at the rows `read`), keys and values (n, heads, D) of normed rows, as attention takes them."""
        q, k, v = self.project(y, read)
        if read is None:
            return *self.turn(q, k, cos, sin), v
        q, _ = self.turn(q, q[:, :0], cos[read], sin[read])
        return q, self.turn(k[:, :0], k, cos, sin)[1], v

    def after_heads(self, run: Run, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stream at the queries' rows x, with attention added, and what the MLP has yet to add to it."""
        heads = run.attend(self.attn, q, k, v, **self.options)
        y, middle = self.behind(self.o_proj(heads.flatten(1)), x)
        return middle, self.mlp_of(y)

    def behind(self, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the MLP reads and the stream behind attention, from what `o_proj` gives and the stream before.

        In one op where there is one: what is rounded to 16 bits behind it is the same in scores and bases of sweeps.
        An edit of what attention adds is added apart, an fp32 rounding from there.
        """
        if self.parallel or self.before_mlp is None:
            middle = x + self.added(attended)
            return self.mlp_reads(x, middle), middle
        return self.before_mlp(attended, x, post=self.after_attn)

    def added(self, attended: Tensor) -> Tensor:
        """What attention adds to the stream, from what `o_proj` gives; beside an fp32 stream not rounded, as where
        `before_mlp` takes the sum."""
        return attended if self.after_attn is None else self.after_attn(self.widened(attended))

    def adds(self, kind: str) -> tuple[nn.Module, Norm | None]:
        """The module that gives what attention (or the MLP, "mlp_out") adds to the stream, and the norm behind it."""
        if kind == "attn_out":
            return self.o_proj, self.after_attn
        return self.mlp if self.inner is None else self.inner.down_proj, self.after_mlp

    def mlp_reads(self, x: Tensor, middle: Tensor) -> Tensor:
        """What the MLP reads, from the stream that enters the layer and that behind attention."""
        stream = x if self.parallel else middle
        return stream if self.before_mlp is None else self.before_mlp(stream)

    def mlp_after(self, x: Tensor, middle: Tensor) -> Tensor:
        """What the MLP adds to the stream, from the same two."""
        return self.mlp_of(self.mlp_reads(x, middle))

    def project(self, y: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (at the rows `read`), keys and values (n, heads, D) of normed rows, before norms and rotation."""
        return self.projections.project(self._narrowed(y), read)

    def turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after their norms and rotation; either may have no heads."""
        return self.projections.turn(q, k, cos, sin)

    def mlp_of(self, y: Tensor) -> Tensor:
        """What the MLP adds to the stream, from its normed rows."""
        if self.inner is not None:
            return self.mlp_from(self.neurons(y))
        out = self.mlp(self._narrowed(y)[None])
        delta = (out[0] if isinstance(out, tuple) else out)[0]
        return self._behind_mlp(delta)

    def neurons(self, y: Tensor) -> Tensor:
        """The MLP's inner activations (n, m) of normed rows."""
        assert self.inner is not None
        return self.inner.neurons(self._narrowed(y))

    def mlp_from(self, neurons: Tensor) -> Tensor:
        """What the MLP adds to the stream, from its inner activations."""
        assert self.inner is not None
        return self._behind_mlp(self.inner.down_proj(neurons))

    def _behind_mlp(self, delta: Tensor) -> Tensor:
        return delta if self.after_mlp is None else self.after_mlp(self.widened(delta))


def settings(layers: list[tuple[nn.Module, Layer]]) -> list[Any]:
    """What the modules that these stand for hold beside parts and weights, which are looked up at each run: scales,
    windows, functions (`settings_of`)."""
    held: list[Any] = []
    for module, layer in layers:
        norms = [each for norm in layer.norms for each in (norm.module, active(norm.module))]
        norms += layer.projections.norm_modules
        for part in (module, layer.attn, layer.mlp, function_of(layer.mlp), *norms):
            held += settings_of(part)
    return held
