"""How the layers of a body are taken apart: by the names of their parts, then by what a run of its own shows.

Names say which modules are projections and MLPs. Where norms stand, how heads are turned and whether the parts make
what the model's own modules make is seen in one run on a few tokens; layers for which that fails run as the modules
that they are, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.binding import Binding
from rmfast.binding.layer_list import layer_list
from rmfast.binding.modules import PASSIVE, is_plain
from rmfast.binding.session import of_this_thread
from rmfast.engine.attention import Run
from rmfast.engine.heads import ROTATIONS, Heads
from rmfast.engine.layers import Layer
from rmfast.engine.mlps import Mlp
from rmfast.engine.norms import Norm
from rmfast.engine.wiring import Seen, wiring

_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_MASKS = {"bias", "masked_bias", "embed_positions"}  # buffers that GPT-2 and GPT-J, or older ones, make of nothing
_BIASES = ("alibi", "position_bias")  # what may be given to attention beside the rows, and is not known here

Layers = list[tuple[nn.Module, Layer]]
HeadsOf = dict[nn.Module, tuple[Tensor, Tensor, Tensor]]  # queries, keys and values (n, heads, D) by attention module


def by_names(binding: Binding) -> Layers | str:
    """Every decoder layer by the names of its parts, or the reason why they are run as the modules that they are."""
    layers = getattr(binding.body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        try:
            layers = layer_list(binding)[1]
        except ValueError:
            return "the body has no list of its layers"
    found: Layers = []
    for index, module in enumerate(layers):
        layer = _by_names(module, last=index == len(layers) - 1)
        if isinstance(layer, str):
            return f"{_where(index, module)}: {layer}"
        found.append((module, layer))
    return found


def _where(index: int, module: nn.Module) -> str:
    return f"layer {index} ({type(module).__name__})"


def _by_names(module: nn.Module, last: bool) -> Layer | str:
    parts = dict(module.named_children())
    attn = next((parts[name] for name in _ATTENTION if name in parts), None)
    if attn is None:
        return "it has no part that is named as attention"
    if not is_plain(module):
        return "it carries hooks"
    projections = Heads.of(attn)
    if isinstance(projections, str):
        return projections
    mlp = parts.get("mlp", module)
    inner = Mlp.within(module) if mlp is module else Mlp.of(mlp)
    if mlp is module and inner is None:
        return "it has no MLP"
    return Layer(attn, mlp, projections, inner, last=last)


def watched(layers: Layers) -> list[nn.Module]:
    """The modules whose calls show how the layers are made."""
    found: list[nn.Module] = []
    for module, layer in layers:
        heads = layer.projections
        found += [module, layer.attn, heads.o_proj, heads.kv_proj, *_mlp_ends(module, layer), *_others(module, layer)]
        found += [] if layer.inner is None else [layer.inner.down_proj]
        found += [each for pair in heads.normed for each in pair]
    return list(dict.fromkeys(found))


def by_run(layers: Layers, seen: dict[nn.Module, Seen]) -> str | None:
    """Sets how the layers are wired and their sizes, by a run of the model's own; or why that can't be."""
    for index, (module, layer) in enumerate(layers):
        if reason := _by_run(module, layer, seen):
            return f"{_where(index, module)}: {reason}"
    return None


def _by_run(module: nn.Module, layer: Layer, seen: dict[nn.Module, Seen]) -> str | None:
    if module not in seen or layer.attn not in seen:
        return "it, or its attention, is not called with its rows first"
    width = seen[module].given.size(-1)
    norms: list[Norm] = []
    for part in _others(module, layer):
        if (norm := Norm.of(part, width)) is None:
            return f"its {type(part).__name__} is no norm of its stream that rmfast knows"
        norms.append(norm)
    found = wiring(seen, module, layer.attn, _mlp_ends(module, layer), norms)
    if isinstance(found, str):
        return found
    if given := [name for name in _BIASES if seen[layer.attn].kwargs.get(name) is not None]:
        return f"its attention is given {given[0]}"
    heads = layer.projections
    if heads.o_proj not in seen or heads.kv_proj not in seen:
        return "projections of its attention are not called"
    if any(norm not in seen or not _reads(seen[norm], seen.get(projection)) for norm, projection in heads.normed):
        return "norms of its heads are not given what its projections give"
    heads.count, left = divmod(seen[heads.o_proj].given.size(-1), heads.size)
    columns = seen[heads.kv_proj].result.size(-1) // heads.size
    heads.kv_count = columns if heads.fused is None else (columns - heads.count) // 2
    if left or heads.kv_count < 1 or heads.count % heads.kv_count:
        return "its projections do not make heads of one size"
    layer.before_attn, layer.after_attn = found.before_attn, found.after_attn
    layer.before_mlp, layer.after_mlp, layer.parallel = found.before_mlp, found.after_mlp, found.parallel
    layer.width = width
    if layer.inner is not None and layer.inner.down_proj in seen:
        layer.neuron_count = seen[layer.inner.down_proj].given.size(-1)
    returned = seen[module].returned
    layer.beside = len(returned) - 1 if isinstance(returned, tuple) else None
    return None


def _reads(call: Seen, made: Seen | None) -> bool:
    """Whether a call is given (a part of) what another gave, as it was given."""
    if made is None or call.given.untyped_storage().data_ptr() != made.result.untyped_storage().data_ptr():
        return False
    return torch.equal(made.result, made.result_copy)  # else turned in place


def _mlp_ends(module: nn.Module, layer: Layer) -> tuple[nn.Module, nn.Module]:
    """The modules that the MLP begins and ends with."""
    if layer.mlp is not module:
        return layer.mlp, layer.mlp
    assert layer.inner is not None
    return layer.inner.up_proj, layer.inner.down_proj


def _others(module: nn.Module, layer: Layer) -> list[nn.Module]:
    """A layer's parts beside attention and MLP, dropouts left out."""
    inside = layer.inner.parts if layer.mlp is module and layer.inner is not None else set()
    return [
        part
        for name, part in module.named_children()
        if part is not layer.attn and part is not layer.mlp and name not in inside and not isinstance(part, PASSIVE)
    ]


def by_formula(layers: Layers, seen: dict[nn.Module, Seen], run: Run, own: HeadsOf, limit: float) -> str | None:
    """Finds how the layers turn their heads, and holds their parts against those of the model's own run.

    In 16 bits, or where weights are small, the whole need not show that queries are turned by another formula.

    Args:
        run: one in which the layers' attention can run on the same rows.
        own: the heads that the model gave its attention; of a model that keeps them to itself (Falcon) none, and what
            attention makes of them is compared.
        limit: the relative error up to which a part is the model's own.
    """
    for index, (module, layer) in enumerate(layers):
        call, entered = seen[layer.attn], seen[module]
        if reason := _unread(module, layer):
            return f"{_where(index, module)}: {reason}"
        tables = layer.tables(entered.given, entered.kwargs)  # as when it runs
        tried: list[tuple[float, str]] = []
        scale, own_scale = layer.options["scale"], getattr(layer.attn, "scaling", None)
        if scale == 1 and isinstance(own_scale, float):
            layer.options["scale"] = own_scale  # its queries are scaled already (OPT), which those made here are not
        ways = product((False, True), ROTATIONS) if tables[0].size(1) else [(False, None)]
        for layer.sines_first, layer.projections.rotation in ways:
            try:
                tables = layer.tables(entered.given, entered.kwargs)
                if own:
                    parts = _own_heads(layer, call, tables, own[layer.attn], scale)
                else:
                    parts = _attended(layer, seen, tables, run)
                tried.append(max((error_of(got, want), name) for name, got, want in parts))
            except ValueError:  # a table that does not fit this rotation
                continue
            if tried[-1][0] <= limit:
                break
        else:
            error, what = min(tried, default=(torch.inf, "queries"))
            return f"{what} of layer {index} differ from the model's own by {error:.1e}"
        if layer.inner is None:
            continue
        if not (error := _mlp_error(module, layer, seen)) <= limit:
            return f"MLPs of layer {index} differ from the model's own by {error:.1e}"
    return None


def _unread(module: nn.Module, layer: Layer) -> str | None:
    """Why weights that modules hold beside their parts rule it out that they are replaced: none reads these (gates)."""
    for part in dict.fromkeys((module, layer.attn, *(() if layer.inner is None else (layer.mlp,)))):
        held = {name for name, _ in part.named_parameters(recurse=False)} - {layer.options.get("sinks")}
        buffers = {name for name, _ in part.named_buffers(recurse=False)}
        held |= buffers - (_MASKS & part._non_persistent_buffers_set)
        if held:
            return f"its {type(part).__name__} holds {min(held)} beside its parts"
    return None


def _mlp_error(module: nn.Module, layer: Layer, seen: dict[nn.Module, Seen]) -> float:
    """Of the MLP by its parts against the model's own: on the run's rows, and on larger ones, which bounds show at."""
    assert layer.inner is not None
    begins, ends = _mlp_ends(module, layer)
    call = seen[begins]
    pairs = [(layer.inner(_rows(call.given_copy)), _rows(seen[ends].result_copy))]
    for factor in () if begins is not ends else (10, 100):
        rows = call.given_copy * factor
        out = _called(layer.mlp, call, rows)
        pairs.append((layer.inner(_rows(rows)), _rows(out[0] if isinstance(out, tuple) else out)))
    finite = [got.isfinite() & want.isfinite() for got, want in pairs]
    return max(error_of(got[at], want[at]) for (got, want), at in zip(pairs, finite))


def _called(module: nn.Module, call: Seen, rows: Tensor) -> Any:
    """What a module makes of other rows than in a call of its own."""
    if call.args:
        return module(rows, *call.args[1:], **call.kwargs)
    return module(**{**call.kwargs, "hidden_states": rows})


def _own_heads(
    layer: Layer, call: Seen, tables: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor, Tensor], scale: float | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The heads, and the model's own, which it gave to attention of that scale."""
    q, k, v = layer.heads(_rows(call.given_copy), *tables)
    q = q if scale is None else q * (layer.options["scale"] / scale)
    rotated = layer.projections.rotated(tables[0])
    ordered = (layer.projections.ordered(heads, rotated) for heads in own[:2])
    yield from zip(("queries", "keys", "values"), (q, k, v), (*ordered, own[2]))


def _attended(
    layer: Layer, seen: dict[nn.Module, Seen], tables: tuple[Tensor, Tensor], run: Run
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What attention makes of rows, enlarged until its scores tell tokens apart: those of small weights do not."""
    call, noted = seen[layer.attn], []
    rows = call.given_copy
    q, k, _ = layer.project(_rows(rows))
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(q.size(1) // k.size(1), 1)) * layer.options["scale"]
    rows = rows * max(1.0, 2 / float(scores.double().std().clamp(min=1e-9)) ** 0.5)
    note = of_this_thread(lambda module, args: noted.append(args[0].clone()))
    handle = layer.o_proj.register_forward_pre_hook(note)
    try:
        _called(layer.attn, call, rows)
    finally:
        handle.remove()
    made: Any = layer.heads(_rows(rows), *tables)
    yield "attention outputs", run.attend(layer.attn, *made, **layer.options).flatten(1), _rows(noted[0])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))


def error_of(got: Tensor, want: Tensor) -> float:
    """Relative to the whole of what is wanted."""
    difference = float((got.double() - want.double()).norm())
    return difference / float(want.double().norm()) if difference else 0.0
