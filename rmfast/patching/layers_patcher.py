"""Activations read, replaced and differentiated with hooks on a model's own layers: for any architecture, exact.

`LayersPatcher` runs a bound model's own forward with hooks at `points`. A replacement in layer l leaves the layers
below out (their output is the recorded stream), and several replacements of one layer are the rows of one batch. That
is all there is to reuse in an encoder, where every token sees every other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.binding.binding import Binding
from rmfast.binding.find import probe_ids
from rmfast.binding.layer_list import layered
from rmfast.binding.session import of_this_thread, reading, replaced_forward
from rmfast.engine.memory import out_of_memory
from rmfast.heads.given import last_occurrence
from rmfast.patching.points import PLACES, Point, given, points
from rmfast.patching.sites import KINDS, Edits, Values
from rmfast.texts.inputs import Encoded


@dataclass(eq=False)
class LayerRecord:
    """A run of one text (`rmfast.patching.sites.Record`) with the residual stream before and after each layer.

    Attributes:
        types: (T,) token types, or None.
        tails: what each layer returned beside its stream, or None where it returns a tensor.
    """

    ids: np.ndarray
    types: np.ndarray | None
    read: int
    reward: Tensor
    tails: list[tuple | list | None]
    _kept: dict[tuple[str, int], Tensor]

    def activations(self, kind: str, layer: int) -> Tensor:
        """(T, units, width), on the layer's device, for a kind asked for at recording; the streams are always kept."""
        if (kind, layer) not in self._kept:
            kinds = ", ".join(sorted({kind for kind, _ in self._kept}))
            raise ValueError(f"Expected a kind and layer that were recorded ({kinds}), got {kind} of layer {layer}")
        return self._kept[kind, layer]


class LayersPatcher:
    """`rmfast.patching.sites.Patcher` for any bound model: its own layers, run from the one that is edited.

    Exact, up to rounding: a row of a batch is what the model's own forward gives for the text with that one edit,
    alone and unpadded, so that rotary frequencies which go by the length are right as well. Hooks of the user's take
    part in the layers that run.

    Attributes:
        layers: L.
        modules: the layers.
        points: for each layer the `points` that a run on a few tokens bears out: of the right size, and attn_out,
            mlp_out and resid_mid such that they add up to the layer's output.

    Raises:
        ValueError: the model's body has no list of its layers.
    """

    def __init__(self, binding: Binding):
        self.binding, self.modules = layered(binding)
        self.layers = len(self.modules)
        self.points = [points(layer) for layer in self.modules]
        self._sizes: dict[str, tuple[int, int]] = {}
        self._missing: dict[str, str] = {}
        with binding.session():
            self._try()

    def units(self, kind: str) -> tuple[int, int]:
        """Units of a layer and values of each; ValueError where the model's layers lack the part, naming it."""
        if kind not in KINDS:
            raise ValueError(f"Expected a kind to be one of {', '.join(KINDS)}, got {kind!r}")
        if kind in self._missing:
            raise ValueError(self._missing[kind])
        return self._sizes[kind]

    def record(
        self, text: Encoded, read: int, kinds: set[str], layers: Collection[int] | None = None, base: bool = True
    ) -> LayerRecord:
        """Runs a text alone and keeps `kinds` in `layers` (None: all); inside `binding.session()`. Any is a base.

        Args:
            read: where the reward is read; a model that pools by itself reads where it does.
        """
        return self._recorded(text, read, kinds, layers, None)[0]

    def rewards(
        self,
        base: LayerRecord,
        edits: Edits,
        values: Values,
        batch_tokens: int,
        done: Callable[[np.ndarray, Tensor], None],
        skip: np.ndarray,
    ) -> None:
        """Rewards (n, K) of each edited base run: calls done(indices into edits, rewards) batch by batch.

        As `rmfast.patching.sites.Patcher.rewards`; a batch is batch_tokens // T edits of one layer, at least one, and
        half as many each time that memory runs out.
        """
        batch = max(1, batch_tokens // len(base.ids))
        # A batch of resid_post alone need not run the layer itself.
        after = edits.kind == KINDS.index("resid_post")
        order = np.lexsort((edits.kind, after, edits.layer))
        cuts = np.flatnonzero(np.diff(edits.layer[order]) | np.diff(after[order].astype(np.int8))) + 1
        for some in np.split(order, cuts):
            if skip[some].all():
                continue
            layer = int(edits.layer[some[0]])
            new = {int(kind): self._values(values, int(kind), layer, len(base.ids)) for kind in set(edits.kind[some])}
            while len(some):
                now = some[:batch]
                try:
                    out = None if skip[now].all() else self._edited(base, edits[now], new)
                except RuntimeError as error:
                    if len(now) == 1 or not out_of_memory(error):
                        raise
                    batch = len(now) // 2
                    continue
                some = some[batch:]
                if out is not None:
                    done(now, out.cpu())

    def least_tokens(self, base: LayerRecord, edits: Edits) -> int:
        """The rows of one edited run."""
        return len(base.ids)

    def gradients(
        self, text: Encoded, read: int, kinds: set[str], metric: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[LayerRecord, Values]:
        """One forward of a text alone and one backward: the reward's gradient in every activation of `kinds`.

        Enters `binding.session(grad=True)` itself. No gradient of a parameter is computed; what requires_grad says and
        .grad holds stays as it is.

        Args:
            metric: what is differentiated, of the rewards (K,) to a scalar tensor; without it each reward.

        Returns:
            The run's record, as `record` gives it, and gradients(kind, layer): (T, units, width), or for K > 1
            rewards without metric (K, T, units, width); 0 where the reward does not depend on the activation.

        Raises:
            ValueError: layers lack a kind; metric does not return one number that depends on the rewards.
        """
        with self.binding.session(grad=True):
            leaf = Point(self.modules[0], "in").tapped(lambda x: x.detach().requires_grad_())
            captured: dict[tuple[str, int], Tensor] = {}
            with leaf:  # the graph begins at the embedding stream, also where no parameter requires grad
                record, rewards = self._recorded(text, read, kinds, None, captured)
            outputs = list(rewards) if metric is None else [_scalar(metric(rewards))]
            tensors = list({id(x): x for x in captured.values()}.values())  # q, k and v of one projection share theirs
            which = {id(x): i for i, x in enumerate(tensors)}
            found = []
            for i, output in enumerate(outputs):
                more = i < len(outputs) - 1
                grads = torch.autograd.grad(output, tensors, retain_graph=more, allow_unused=True)
                found.append([torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads)])
        views = {
            (kind, layer): [self.points[layer][kind].view(grads[which[id(x)]])[0] for grads in found]
            for (kind, layer), x in captured.items()
        }

        def gradient(kind: str, layer: int) -> Tensor:
            if (kind, layer) not in views:
                asked = ", ".join(sorted(kinds))
                raise ValueError(f"Expected a kind and layer asked for before ({asked}), got {kind} of layer {layer}")
            each = views[kind, layer]
            return each[0] if len(each) == 1 else torch.stack(each)

        return record, gradient

    def _recorded(
        self, text: Encoded, read: int, kinds: set[str], layers: Collection[int] | None,
        captured: dict[tuple[str, int], Tensor] | None,
    ) -> tuple[LayerRecord, Tensor]:  # fmt: skip
        """The run of a text alone and its rewards (K,); with `captured`, the tensors at the kinds' points go there."""
        for kind in kinds:
            self.units(kind)
        kept: dict[tuple[str, int], Tensor] = {}
        tails: list[tuple | list | None] = [None] * self.layers

        def keep(kind: str, layer: int, x: Tensor) -> None:
            if captured is not None and kind in kinds:
                captured[kind, layer] = x
            # A copy, since the model or a hook may go on to change the tensor.
            value = self.points[layer][kind].view(x)[0].detach().clone()
            before = kept.get(("resid_post", layer - 1)) if kind == "resid_pre" else None
            same = before is not None and before.device == value.device and torch.equal(before, value)
            kept[kind, layer] = before if before is not None and same else value

        def tail(layer: int, out: Any) -> None:
            if isinstance(out, tuple | list):
                tails[layer] = type(out)(x.detach() if isinstance(x, Tensor) else x for x in out[1:])

        with ExitStack() as stack:
            for layer, module in enumerate(self.modules):
                note = of_this_thread(lambda module, args, out, layer=layer: tail(layer, out))
                hook = module.register_forward_hook(note)
                stack.callback(hook.remove)
                here = kinds if layers is None or layer in layers else set()
                for kind in sorted(here | {"resid_pre", "resid_post"}):
                    stack.enter_context(self.points[layer][kind].tapped(partial(keep, kind, layer)))
            rewards = self.forward(torch.from_numpy(text.ids)[None], text.types, read)[0]
        return LayerRecord(text.ids, text.types, read, rewards.detach().cpu(), tails, kept), rewards

    def _edited(self, base: LayerRecord, edits: Edits, new: dict[int, Tensor]) -> Tensor:
        """Rewards (n, K) of n edits of one layer, either of resid_post alone or of other kinds."""
        layer = int(edits.layer[0])
        entry = "resid_post" if KINDS[edits.kind[0]] == "resid_post" else "resid_pre"
        stream = base.activations(entry, layer)[:, 0]
        ids = torch.from_numpy(base.ids).expand(len(edits), -1)
        with ExitStack() as stack:
            # The layers below hand on what they are given, which is then replaced by the recorded stream.
            for i in range(layer + (entry == "resid_post")):
                stack.enter_context(replaced_forward(self.modules[i], _passing(base.tails[i])))
            start = self.points[layer][entry]
            stack.enter_context(start.tapped(lambda x: stream.to(x.device, x.dtype).expand_as(x).clone()))
            for kind in np.unique(edits.kind):
                rows = np.flatnonzero(edits.kind == kind)
                which, positions = np.nonzero(edits.groups[edits.group[rows]])
                index = (rows[which], positions, edits.unit[rows][which])
                point = self.points[layer][KINDS[kind]]
                stack.enter_context(point.tapped(partial(_replaced, point, index, new[int(kind)], len(edits))))
            return self.forward(ids, base.types, base.read)

    def forward(self, ids: Tensor, types: np.ndarray | None, read: int) -> Tensor:
        """Rewards (B, K) of texts (B, T) of one length, read at one position; inside `binding.session()`."""
        binding = self.binding
        ids = ids.to(binding.device)
        args = [ids, torch.ones_like(ids)]
        # A decoder that takes token types (GPT-2) looks them up as words; only encoders have them in their inputs.
        if types is not None and not binding.causal:
            args.append(torch.from_numpy(types).expand(*ids.shape).to(ids.device))
        if not binding.reads_rows:
            return binding.pooled(*args)
        batch, length = ids.shape
        first = torch.arange(batch, device=ids.device) * length
        rows = first + read
        with reading(ids.numel(), rows):
            hidden = binding.hidden(*args)
        rows = rows.to(hidden.device)
        program = binding.program
        if program is None or not program.gated:
            return binding.rewards(hidden, rows)
        # What is edited are activations and not ids: the prompt ends where it did. On the probe's tokens it has no end.
        gate = last_occurrence(ids[0].cpu().numpy(), program.pattern) or 0
        return program.rewards(binding.row_values(hidden, rows), binding.row_values(hidden, first.to(rows) + gate))

    def _values(self, values: Values, kind: int, layer: int, length: int) -> Tensor:
        new, shape = values(KINDS[kind], layer), (length, *self.units(KINDS[kind]))
        if tuple(new.shape) != shape:
            raise ValueError(
                f"Expected values of {KINDS[kind]} in layer {layer} to be (T, units, width) = {shape}, "
                f"got {tuple(new.shape)}"
            )
        return new

    # Which points are as they seem ---------------------------------------------------------------------------------

    def _try(self) -> None:
        """Runs a few tokens, leaves the points that they contradict out and notes the sizes of the others."""
        ids = probe_ids(self.binding.root, self.binding.vocab_size, None, ())
        seen: list[dict[str, Any]] = [{} for _ in self.modules]

        with ExitStack() as stack:
            for at, tensors in zip(self.points, seen):
                taps = dict(at)
                if "resid_mid" in at and at["resid_mid"].side == "out":
                    taps["sum"] = Point(at["resid_mid"].module, "in")  # given to the norm whose output resid_mid is
                for kind, point in taps.items():
                    stack.enter_context(point.tapped(partial(_note, tensors, kind)))
            self.forward(ids, None, ids.size(1) - 1)
        for layer, (at, tensors) in enumerate(zip(self.points, seen)):
            wrong = _not_added(at, tensors)
            for kind in KINDS:
                try:
                    size = self._size(kind, layer, tensors.get(kind), ids.size(1))
                    if kind in wrong:
                        raise ValueError(wrong[kind])
                    if self._sizes.setdefault(kind, size) != size:
                        raise ValueError(f"in units of one size, {self._sizes[kind]}, got {size}")
                except ValueError as reason:
                    at.pop(kind, None)
                    where = f"layer {layer} ({type(self.modules[layer]).__name__})"
                    self._missing.setdefault(kind, f"Expected {where} to have {kind}: {reason}")
        for kind in ("resid_pre", "resid_post"):
            self.units(kind)

    def _size(self, kind: str, layer: int, x: Tensor | None, tokens: int) -> tuple[int, int]:
        """Units and width of an activation, as seen on a text of some tokens."""
        point, module = self.points[layer].get(kind), self.modules[layer]
        if point is None:
            names = ", ".join(name for name, _ in PLACES[kind])
            parts = ", ".join(name for name, _ in module.named_modules() if name)
            raise ValueError(f"rmfast looks for {names}; its parts: {parts}")
        if x is None:
            raise ValueError(f"its {type(point.module).__name__}, which would show it, is not called")
        if not isinstance(x, Tensor):
            raise ValueError(
                f"its {type(point.module).__name__}, which would show it, has {type(x).__name__}, no tensor"
            )
        if not x.isfinite().all():
            raise ValueError("it is not finite on ordinary tokens, so that its parts can't be told")
        if x.shape[:-1] != (1, tokens):
            raise ValueError(f"got {tuple(x.shape)} for a text of {tokens} tokens")
        units, width = point.view(x).shape[2:]
        return units, width


def _note(tensors: dict[str, Any], kind: str, x: Any) -> None:
    x = x.clone() if isinstance(x, Tensor) else x
    tensors[kind] = x[None] if isinstance(x, Tensor) and x.dim() == 2 else x  # rows of all texts in one


def _not_added(at: dict[str, Point], seen: dict[str, Any]) -> dict[str, str]:
    """Those of attn_out, mlp_out and resid_mid that are not what their names say, and why."""
    kinds = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    seen = {kind: x for kind, x in seen.items() if isinstance(x, Tensor) and x.is_floating_point()}
    pre, mid, post, attn, mlp = (None if x is None else x.double().cpu() for x in map(seen.get, kinds))

    def adds(total: Tensor | None, *parts: Tensor | None) -> bool:
        if total is None or any(part is None or part.shape != total.shape for part in parts):
            return False
        error, least = (total - sum(parts)).norm(), min(part.norm() for part in parts[1:])  # type: ignore
        # A wrong part, or one that is scaled, is off by its own size; rounding by that of the sum.
        return bool(error <= 0.02 * least + torch.finfo(seen["resid_post"].dtype).eps * total.norm())

    wrong: tuple[str, ...] = ("resid_mid", "attn_out", "mlp_out")
    if "sum" in seen:  # the norm behind the MLP has no kind of its own by which mlp_out could be tried as well
        wrong = () if adds(seen["sum"].double().cpu(), pre, attn) else wrong[:2]
    elif adds(mid, pre, attn) and adds(post, mid, mlp):
        wrong = ()
    elif adds(post, pre, attn, mlp):
        return {} if mid is None else {"resid_mid": "its attention and MLP read the same stream"}
    return {kind: "rmfast finds no parts in it that give what it adds to its stream" for kind in wrong if kind in at}


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"Expected metric to return one number that depends on the rewards, got {got}")
    return value.reshape(())


def _passing(tail: tuple | list | None) -> Callable[..., Any]:
    """A layer's forward that hands on what it is given, in the form in which the layer returns it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = given(args, kwargs)
        return x if tail is None else type(tail)((x, *tail))

    return forward


def _replaced(
    point: Point, index: tuple[np.ndarray, np.ndarray, np.ndarray], new: Tensor, batch: int, x: Tensor
) -> Tensor | None:
    """x with values new (T, units, width) at index, (rows of the batch, positions, units)."""
    rows, positions, units = (torch.from_numpy(i.astype(np.int64)).to(x.device) for i in index)
    if not point.stream:
        x = x.clone()
    point.view(x, batch)[rows, positions, units] = new.to(x.device, x.dtype)[positions, units]
    return None if point.stream else x
