"""The model under interventions: clamps folded into copies of its matrices or set by index, directions at its norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmfast.arguments import instance, sequence, wholes
from rmfast.binding.binding import Binding, Removal
from rmfast.binding.find import probe_ids
from rmfast.binding.layer_list import layer_list
from rmfast.binding.modules import Snapshot, is_plain, is_readable
from rmfast.binding.session import Clamp, lock_of, on_the_host, share_lock
from rmfast.debias.interventions import LWR, DirectionRemoval, Intervention, NeuronClamp, combined
from rmfast.engine.programs import run_heads
from rmfast.engine.scorer import Scorer
from rmfast.texts.inputs import Encoded

S = TypeVar("S", bound=Scorer)


def projections(rm: Scorer) -> dict[str, int]:
    """The projections of the model's layers, by name and in their order, and how many neurons each has.

    They are q_proj, k_proj, v_proj (or qkv_proj), o_proj, gate_proj, up_proj (or gate_up_proj) and down_proj of
    decoders like Llama, and in all models the outermost linear modules (Linear, Conv1D, quantised ones, those that peft
    wraps) inside of the layers.

    Raises:
        ValueError: the model's body has no list of its layers.
    """
    instance("rm", rm, Scorer)
    prefix, layers = layer_list(rm.binding)
    body = rm.binding.body_name
    found: dict[str, int] = {}
    for i, layer in enumerate(layers):
        for name, module in layer.named_modules():
            full = ".".join(filter(None, (body, prefix, str(i), name)))
            size = _neuron_count(module)
            outer = full.split(".")
            if size is not None and not any(".".join(outer[:n]) in found for n in range(1, len(outer))):
                found[full] = size
    return found


def _neuron_count(module: nn.Module) -> int | None:
    if isinstance(module, Conv1D):
        return int(module.nf)
    size = getattr(module, "out_features", None)
    linear = isinstance(module, nn.Linear) or hasattr(module, "base_layer") or hasattr(module, "in_features")
    return size if linear and isinstance(size, int) else None


def intervened(rm: S, interventions: Iterable[Any]) -> S:
    """See `RewardModel.with_interventions`."""
    some = [rm.interventions] if rm.interventions is not None else []
    for value in interventions:
        if not isinstance(value, Intervention):
            raise TypeError(
                "Expected interventions to be NeuronClamp, DirectionRemoval, LengthPenalty, LWR or sums of them, got "
                f"{type(value).__name__}"
            )
        some.append(value)
    if not some:
        return rm
    total = combined(some)
    _check(rm.base or rm, total)
    with lock_of(rm.binding.root), on_the_host():  # a run in another thread has the modules' forwards replaced
        return _under(rm, total)


def _under(rm: S, total: Intervention) -> S:
    """The model under all of `total`, which holds what it carries already."""
    source, new, everywhere = _folded(rm, total)
    root = source.binding.root if new is None else new[source.binding.root]
    last = [
        _clamp(root, name, indices, values, last=True)
        for part in total.parts
        if isinstance(part, NeuronClamp) and part.positions == "last"
        for name, (indices, values) in part.neurons.items()
    ]
    before, after = (_removal(total, side) for side in ("before", "after"))
    made_of = source.binding.copied_from
    if new is not None:
        folded = [m for m in new if any(new[m]._parameters[name] is not p for name, p in m._parameters.items())]
        made_of = Snapshot.of(source.binding.root, folded)
    binding = replace(
        source.binding,
        root=root,
        clamps=(*everywhere, *last),
        before=before,
        after=after,
        copied_from=made_of,
    )
    made = source.moved(binding, new)
    made.model, made.interventions, made.base = root if new else source.model, total, rm.base or rm
    return made


def _removal(total: Intervention, side: str) -> Removal | None:
    for part in total.parts:
        if isinstance(part, DirectionRemoval) and part.norm == side:
            return Removal(part.directions, part.strength)
    return None


def _check(rm: Scorer, total: Intervention) -> None:
    """ValueError where an intervention does not belong to the model."""
    binding, name = rm.binding, type(rm.binding.root).__name__
    if total.fingerprint is not None and total.fingerprint != rm.fingerprint:
        raise ValueError(
            f"Expected an intervention that was made with this {name}, got one of another model: its fingerprint (of "
            f"the architecture and a sample of the weights) is {total.fingerprint[:12]}, this model's "
            f"{rm.fingerprint[:12]}. Fit it anew on this model"
        )
    known: dict[str, int] | None = None
    for part in total.parts:
        if isinstance(part, NeuronClamp):
            if part.positions == "last" and rm.pools:
                raise ValueError(f'{name} pools by itself, so that it has no last token: expected positions="all"')
            known = projections(rm) if known is None else known
            for module, (indices, _) in part.neurons.items():
                if module not in known:
                    raise ValueError(
                        f"Expected neurons of a projection of {name} ({', '.join([*known][:8])}, ...), got {module!r}"
                    )
                if len(indices) and int(indices[-1]) >= known[module]:
                    raise ValueError(f"Expected neurons of {module} in [0, {known[module]}), got {int(indices[-1])}")
        elif isinstance(part, DirectionRemoval):
            if not binding.reads_rows:
                raise ValueError(f"{name} pools by itself, so that no stream of a token makes its reward")
            if part.norm == "before" and binding.norm is None:
                raise ValueError(f'Expected norm="after" for {name}, in which rmfast finds no final norm')
            d = binding.width
            if part.directions.size(1) != d:
                raise ValueError(f"Expected directions of {name} to be (J, {d}), got {tuple(part.directions.shape)}")
        elif isinstance(part, LWR) and rm.num_labels > 1:
            raise ValueError(f"Expected a model of one reward for LWR, got {rm.num_labels}")


def _folded(rm: S, total: Intervention) -> tuple[S, dict[nn.Module, nn.Module] | None, list[Clamp]]:
    """The clamps at all positions, in the model's matrices where they can be.

    Returns:
        The model to start from; its modules' copies with the clamps folded in, or None for no copies; the clamps that
        are left for runs to set.
    """
    if clamp_key(total, "all") == clamp_key(rm.interventions, "all"):  # they are in place
        return rm, None, [clamp for clamp in rm.binding.clamps if not clamp.last]
    base: Any = rm.base or rm
    root = base.binding.root
    # A forward that was bound to a module's instance would go on to run that one, not its copy.
    copyable = all(is_plain(m) and getattr(m, "_compiled_call_impl", None) is None for m in root.modules())
    fold: dict[str, tuple[Tensor, Tensor]] = {}
    left = []
    for part in total.parts:
        if not isinstance(part, NeuronClamp) or part.positions == "last":
            continue
        for name, pair in part.neurons.items():
            module = root.get_submodule(name)
            if copyable and type(module) in (nn.Linear, Conv1D) and is_readable(module):
                fold[name] = pair
            else:
                left.append(_clamp(root, name, *pair, last=False))
    copies: dict[nn.Module, nn.Module] = {}
    if fold:
        share_lock(root, _copied(root, copies))
        for name, pair in fold.items():
            _fold(copies[root].get_submodule(name), *pair)
        by_index = [_clamp(root, name, *pair, last=False) for name, pair in fold.items()]
        if _same_model(base.binding, copies[root], by_index):
            return base, copies, left
        left += by_index
    return base, None, left


def _same_model(binding: Binding, copied: nn.Module, clamps: list[Clamp]) -> bool:
    """Whether a folded copy gives on a few tokens what the model gives with the clamps set by index.

    It does not where a module holds another one beside its submodules, and runs that in place of its copy.
    """
    ids = probe_ids(binding.root, binding.vocab_size, None, ()).to(binding.device)
    states = []
    for bound in (binding, replace(binding, clamps=tuple(clamps)), replace(binding, root=copied)):
        with bound.session():
            out = (
                bound.hidden(ids, torch.ones_like(ids))
                if binding.reads_rows
                else bound.pooled(ids, torch.ones_like(ids))
            )
            states.append(out.double().cpu())
    plain, wanted, got = states
    rounding = 1e-5 if binding.stream_dtype.itemsize > 2 else 1e-2
    return bool((got - wanted).norm() <= 0.1 * (plain - wanted).norm() + rounding * wanted.norm())


def _clamp(root: nn.Module, name: str, indices: Tensor, values: Tensor, last: bool) -> Clamp:
    """With its tensors where the module's are."""
    held = next(root.get_submodule(name).parameters(), values)
    on = values.device if held.is_meta else held.device
    return Clamp(name, indices.to(on), values.to(on), last)


def _copied(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module tree of its own over the same parameters and buffers."""
    if module not in copies:
        made = copies[module] = copy.copy(module)
        # Hooks, parameters and buffers are kept in dicts, which a shallow copy shares.
        own = {name: copy.copy(value) for name, value in module.__dict__.items() if isinstance(value, dict)}
        made.__dict__.update(own)
        made._modules = {name: None if m is None else _copied(m, copies) for name, m in module._modules.items()}
    return copies[module]


def _fold(module: Any, indices: Tensor, values: Tensor) -> None:
    """Sets output channels of a Linear or Conv1D: their weights 0, their bias the value. In copies of both."""
    with torch.no_grad(), torch.inference_mode(False):
        weight, at = module.weight.detach().clone(), indices.to(module.weight.device)
        rows = weight if isinstance(module, nn.Linear) else weight.T
        rows[at] = 0
        bias = rows.new_zeros(rows.size(0)) if module.bias is None else module.bias.detach().clone()
        bias[at] = values.to(bias)
        grad = module.weight.requires_grad
        module._parameters |= {"weight": nn.Parameter(weight, grad), "bias": nn.Parameter(bias, grad)}


def variants_of(rm: Scorer, interventions: Sequence[Any], index: Sequence[int] | None) -> Callable[..., Tensor]:
    """What `score` runs for several interventions: a function of `Scorer.run`'s arguments -> (V, N, K), or with
    an index of the one that each input gets (N, K)."""
    interventions = sequence("interventions", interventions, "a list of them")
    asked = None
    if index is not None:
        asked = np.array(wholes("intervention_index", index, least=-1, most=len(interventions) - 1), np.int64)
        interventions = [*interventions, None]  # which -1 is, from the end
    folded: dict[tuple, Scorer] = {}  # with clamps at all positions alone: variants that share them share a copy

    def made(value: Any) -> Scorer:
        if value is None:
            return rm
        key = clamp_key(value, "all") if isinstance(value, Intervention) else ()
        if key and key not in folded:
            folded[key] = intervened(rm, [part for part in value.parts if getattr(part, "positions", None) == "all"])
        return intervened(folded.get(key, rm), [value])

    models = [made(value) for value in interventions]
    chosen = None if asked is None else asked % len(models)
    groups: dict[Any, list[int]] = {}
    for i, model in enumerate(models):
        groups.setdefault(clamp_key(model.interventions), []).append(i)

    def run(
        encoded: list[Encoded], read: list[np.ndarray], batch_tokens: int | None, progress: bool, engine: str | None
    ) -> Tensor:
        if chosen is not None and len(chosen) != len(encoded):
            raise ValueError(f"Expected intervention_index for each of {len(encoded)} inputs, got {len(chosen)}")
        out = [torch.empty(0)] * len(models if chosen is None else encoded)
        for group in groups.values():
            some = np.arange(len(encoded))
            if chosen is not None:
                group = [i for i in group if i in chosen]
                some = np.flatnonzero(np.isin(chosen, group))
            if not group:
                continue
            items = [encoded[n] for n in some]
            heads = [models[i].binding for i in group]
            reads = [read[n] for n in some]
            values = run_heads(models[group[0]], heads, items, reads, (batch_tokens, progress, engine))
            rewards = torch.cat(values) if values else torch.empty(0, rm.num_labels * len(group))
            one_each = rewards.size(1) == rm.num_labels  # a model that pools by itself runs no head of ours
            for j, i in enumerate(group):
                own = rewards if one_each else rewards.unflatten(1, (len(group), -1))[:, j]
                if chosen is None:
                    out[i] = models[i].corrected(own, items)
                    continue
                # Rewards of all of a group's heads are there, as texts that are alike share one row: a row has no one
                # intervention, which the op's own intervention_index would ask for.
                mine = np.flatnonzero(chosen[some] == i)
                fixed = models[i].corrected(own[torch.from_numpy(mine)], [items[n] for n in mine])
                for n, reward in zip(some[mine], fixed):
                    out[n] = reward
        if not out:
            return torch.empty(*(() if chosen is not None else (0,)), len(encoded), rm.num_labels)
        return torch.stack(out)

    return run


def clamp_key(total: Intervention | None, *positions: str) -> tuple:
    """Equal for interventions that clamp the same neurons to the same values, at these positions (none: at all)."""
    return tuple(
        (part.positions, name, indices.numpy().tobytes(), values.double().numpy().tobytes())
        for part in (total.parts if total is not None else ())
        if isinstance(part, NeuronClamp) and (not positions or part.positions in positions)
        for name, (indices, values) in sorted(part.neurons.items())
    )
