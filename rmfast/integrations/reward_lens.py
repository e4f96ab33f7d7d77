"""reward-lens (arXiv 2604.26130) on rmfast's engines: `enable()`, and its own calls run here, with the same numbers.

What is replaced, and put back by `disable()`:

    HFRuntime.final_head_inputs, full_head_inputs    scores and prefix scores: packed texts, shared prefixes run once
    PatchGrid.measure                                component and head grids: the suffix engine
    RewardModel's forward with cache, of one text    ComponentAttribution, RewardLens: one packed run
    ActivationPatcher's three grids (2.0.1)          the suffix engine

The numbers are reward-lens' own: its lens and attribution leave the final norm out, activations are exchanged between
positions of the same index, and each reward is read where it reads it. A call that these engines do not give the same
numbers for (hooks on the model, other heads, texts of different lengths where padding changes them) runs reward-lens'
own code; `explain()` says which calls did, and why.
"""

from __future__ import annotations

import copy
import functools
import importlib
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmfast import model as _model
from rmfast.engine import Engine
from rmfast.inputs import Encoded
from rmfast.patching import SuffixPatcher
from rmfast.planner import plan, windows
from rmfast.scoring import RewardModel
from rmfast.sites import KINDS, Edits
from rmfast.sweep import _budget

__all__ = ["SUPPORTED", "disable", "enable", "explain"]

SUPPORTED = ("2.0.1", "3.1.0")

Cell = tuple[str, int, int]  # kind, layer, unit


class _Outside(Exception):
    """The call is reward-lens' own to run; the message says why."""


# Turning it on and off ------------------------------------------------------------------------------------------------

_guard = threading.RLock()
_depth = 0
_replaced: list[tuple[Any, str, Any]] = []  # owner, attribute, what it was
_calls: Counter[tuple[str, str]] = Counter()  # (what, why reward-lens' own code ran; "" where it did not)


class _Enabled:
    """Leaving it turns the integration off again."""

    def __enter__(self) -> _Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        disable()


def enable() -> _Enabled:
    """Run reward-lens' calls on rmfast's engines, in this process and from now on, for models wrapped before as well.

    Calls may be nested: the same number of `disable()` turns it off. As a context manager it is off at the end:

        with rmfast.integrations.reward_lens.enable():
            evidence = PatchGrid("head").measure(context)

    Raises:
        ImportError: reward-lens is not installed, or is a version that lacks what is replaced. One that is not in
            SUPPORTED but has it all is a warning.
    """
    global _depth
    with _guard:
        if _depth == 0:
            replacements = _replacements()
            _calls.clear()
            for owner, name, new in replacements:
                _replaced.append((owner, name, vars(owner)[name]))
                setattr(owner, name, new)
        _depth += 1
    return _Enabled()


def disable() -> None:
    """Undo one `enable()`; with the last one every attribute of reward-lens is what it was. Nothing where it is off."""
    global _depth
    with _guard:
        _depth = max(0, _depth - 1)
        while _depth == 0 and _replaced:
            setattr(*_replaced.pop())


def explain() -> str:
    """Whether it is on, and for each replaced call how often it ran here, or as reward-lens' own code and why."""
    lines = [f"reward-lens on rmfast: {'on' if _depth else 'off'}"]
    for (what, why), count in sorted(_calls.items()):
        lines.append(f"{what}: {count} × {f'reward-lens itself ({why})' if why else 'rmfast'}")
    return "\n".join(lines)


def _replacements() -> list[tuple[Any, str, Any]]:
    version = _version()
    hf, patch = _module("runtime.hf"), _module("measure.battery.patch")
    names: dict[Any, dict[str, Callable[..., Any]]] = {
        hf.HFRuntime: {"final_head_inputs": _final_head_inputs, "full_head_inputs": _full_head_inputs},
        patch.PatchGrid: {"measure": _measure},
        _module("model").RewardModel: {
            "_forward_with_cache_from_inputs": _cached,
            "_forward_with_cache_batch_from_inputs": _cached_batch,
        },
    }
    if version.startswith("2."):
        names[_module("patching").ActivationPatcher] = {
            "patch_all_components": _patch_all_components,
            "patch_all_components_mean": _patch_all_components_mean,
            "patch_all_heads": _patch_all_heads,
        }
    lacking = [f"{owner.__name__}.{name}" for owner in names for name in names[owner] if name not in vars(owner)]
    known = f"versions {' and '.join(SUPPORTED)}"
    if lacking:
        raise ImportError(f"reward-lens {version} has no {', '.join(lacking)}: rmfast knows {known}")
    if version not in SUPPORTED:
        warnings.warn(f"reward-lens {version} is not among the {known} that rmfast is tested with", stacklevel=3)
    made: list[tuple[Any, str, Any]] = [
        (owner, name, _or_itself(f"{owner.__name__}.{name}", vars(owner)[name], ours))
        for owner, each in names.items()
        for name, ours in each.items()
    ]
    return [*made, (patch, "run_patched_scores", _known_or(patch.run_patched_scores))]


def _version() -> str:
    try:
        return importlib.import_module("reward_lens").__version__
    except ModuleNotFoundError as error:
        if error.name != "reward_lens":
            raise
        raise ImportError(
            'rmfast.integrations.reward_lens needs reward-lens: pip install "reward-lens[white-box]==3.1.0", or '
            "reward-lens==2.0.1"
        ) from None


def _module(name: str) -> Any:
    return importlib.import_module(f"reward_lens.{name}")


def _or_itself(what: str, original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs ours(original, self, ...), and the original where the call is outside of what ours does."""

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = ours(original, self, *args, **kwargs)
        except _Outside as why:
            _calls[what, str(why)] += 1
            return original(self, *args, **kwargs)
        _calls[what, ""] += 1
        return result

    return call


# A model bound once ---------------------------------------------------------------------------------------------------

# A RewardModel holds its model: kept as long as what reward-lens wraps the model in (a runtime, its RewardModel), it
# goes when they go; other wrappers of the same model find it in _by_model.
_by_owner: weakref.WeakKeyDictionary[Any, RewardModel | str] = weakref.WeakKeyDictionary()
_by_model: weakref.WeakKeyDictionary[nn.Module, weakref.ref[RewardModel]] = weakref.WeakKeyDictionary()


def _bound(owner: Any) -> RewardModel:
    """The model of a runtime or of reward-lens' RewardModel, bound; _Outside where its own forward has more to do."""
    for name, module in owner.model.named_modules():
        if _model._hooked(module):
            raise _Outside(f"hooks on {name or 'the model'}")
        if module.training:
            raise _Outside("the model is in training mode")
    with _guard:
        found = _by_owner.get(owner)
        if found is None or (isinstance(found, RewardModel) and found.model is not owner.model):
            known = _by_model.get(owner.model)
            found = known() if known is not None else None
            if found is None:
                found = _bind(owner.model)
            _by_owner[owner] = found
            if isinstance(found, RewardModel):
                _by_model[owner.model] = weakref.ref(found)
    if isinstance(found, str):
        raise _Outside(found)
    return found


def _bind(model: nn.Module) -> RewardModel | str:
    try:
        rm = RewardModel(model)
    except ValueError as error:
        return str(error)
    if not rm.binding.causal or not rm.binding.head:
        return "tokens of its model see those behind them, or it pools by itself"
    rm._warned = True  # a text that ends with padding is read where reward-lens reads it, and nobody asked rmfast
    return rm


def _engine(rm: RewardModel) -> Engine:
    engine = rm._packed_engine()
    if isinstance(engine, str):
        raise _Outside(f"not packed: {engine}")
    return engine


def _same_alone(rm: RewardModel, lengths: Sequence[int]) -> None:
    """_Outside where a text gets other numbers in reward-lens' left-padded batch than alone, as it is run here."""
    if not lengths or min(lengths) == 0:
        raise _Outside("an empty text")
    if any(rm.binding.length_group(max(lengths))):
        raise _Outside("rotary frequencies that depend on the longest text")
    if rm._table is not None and min(lengths) < max(lengths):
        raise _Outside("positions are learned, and padding on the left shifts them")


# Head inputs: scores and prefix scores --------------------------------------------------------------------------------


def _head_inputs(runtime: Any, texts: list[np.ndarray], every: bool) -> Tensor:
    """What the head is given at each text's last token (n, d), or at all tokens (T₁ + T₂ + ..., d), in its dtype."""
    rm = _bound(runtime)
    binding, engine, lengths = rm.binding, _engine(rm), [len(ids) for ids in texts]
    if len(binding.head) != 1 or binding.head[0] is not runtime.head_module:
        raise _Outside("the head is not one module")
    _same_alone(rm, lengths)
    found = []
    try:
        with binding.session():
            norm = binding.norm if binding.leaves_norm_out and binding.norm is not None else nn.Identity()
            for some in windows(lengths):
                ids = np.concatenate([texts[i] for i in some], dtype=np.int32)
                cu = np.cumsum([0, *(lengths[i] for i in some)])
                read: Any = "all" if every else np.array([lengths[i] - 1 for i in some])
                planned = plan(ids, cu, batch_tokens=rm._default_batch_tokens(engine), read=read)
                rows = torch.cat([norm(hidden[None])[0] for _, hidden in engine.run(ids, planned, 0)])
                found.append(rows[torch.from_numpy(planned.read_index).to(rows.device)])
            flat = torch.cat(found)
    except RuntimeError as error:
        if not _model.out_of_memory(error):
            raise
        raise _Outside("out of memory") from error
    return flat.clone()  # outside of inference mode: an ordinary tensor


def _ids(tokenized: Any) -> np.ndarray:
    if tokenized.attention_mask and not all(tokenized.attention_mask):
        raise _Outside("a text whose attention mask leaves tokens out")
    return np.asarray(tokenized.input_ids, np.int64)


def _final_head_inputs(original: Any, self: Any, tokenized: Sequence[Any], batch_size: int | None = None) -> Tensor:
    return _head_inputs(self, [_ids(each) for each in tokenized], every=False)


def _full_head_inputs(original: Any, self: Any, batch: Any) -> tuple[Tensor, list[list[int]]]:
    """Rows of padding are 0; reward-lens has there what the model makes of padding, and reads none of it."""
    mask = batch.attention_mask.bool().cpu()
    columns = torch.arange(mask.size(1))
    if "tokenized" not in batch.meta or "offsets" not in batch.meta:
        raise _Outside("a batch that its collate did not make")
    offsets = torch.tensor(batch.meta["offsets"])
    if not torch.equal(mask, columns >= offsets[:, None]):
        raise _Outside("a batch whose attention mask leaves tokens out")
    ids = batch.input_ids.cpu().numpy()
    flat = _head_inputs(self, [row[keep] for row, keep in zip(ids, mask.numpy())], every=True)
    out = flat.new_zeros(*mask.shape, flat.size(-1))
    out[mask.to(out.device)] = flat
    return out, [columns[keep].tolist() for keep in mask]


# Patched rewards ------------------------------------------------------------------------------------------------------


def _patched(
    rm: RewardModel,
    base_text: tuple[np.ndarray, int],
    other_text: tuple[np.ndarray, int] | None,
    cells: list[Cell],
    replaced: int | slice,
    values: dict[tuple[str, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rewards of the base text with one cell replaced at once, at the same positions in each.

    Args:
        base_text, other_text: token ids and the position at which the reward is read.
        replaced: the positions that are replaced, of the base text.
        values: by kind and layer (width,), what is put in. Without them the other text's activations at the same
            positions, and zeros behind its end (everywhere, where there is no other text).

    Returns:
        Rewards of the base text (K,); of the other text (K,), or None where it is run beyond its read position; and of
        the cells (n, K).
    """
    texts = [text for text in (base_text, other_text) if text is not None]
    if any(any(rm.binding.length_group(len(ids))) for ids, _ in texts):
        raise _Outside("rotary frequencies that depend on a text's length")
    patcher, (ids, read) = rm._patcher(), base_text
    groups = np.zeros((1, len(ids)), bool)
    groups[0, replaced] = True
    groups[:, read + 1 :] = False  # has no part in the reward
    known = True
    if other_text is not None:  # before the texts first differ, the values put in are those that stand there
        shared = min(len(ids), len(other_text[0]))
        groups[:, : int(np.append(ids[:shared] == other_text[0][:shared], False).argmin())] = False
        known = not groups[0, other_text[1] + 1 : shared].any()
        if not known:  # it must run beyond where its reward is read
            other_text = (other_text[0], len(other_text[0]) - 1)
    kinds, layers, units = (np.array(column) for column in zip(*cells))
    effect = groups.any() & ((layers < patcher.layers - 1) | groups[0, read])
    names = set(kinds.tolist())
    with rm.binding.session():
        recorded = names | ({"resid_mid"} if isinstance(patcher, SuffixPatcher) else set())
        base = patcher.record(Encoded(ids), read, recorded)
        other = None if other_text is None else patcher.record(Encoded(other_text[0]), other_text[1], names, base=False)

        @lru_cache(4)
        def rows(kind: str, layer: int) -> Tensor:
            like = base.activations(kind, layer)
            if values is not None:
                return values[kind, layer].to(like).expand_as(like)
            out = torch.zeros_like(like)
            if other is not None:
                new = other.activations(kind, layer)[: len(out)]
                out[: len(new)] = new
            return out

        where = np.flatnonzero(effect)
        rewards = base.reward.repeat(len(cells), 1)
        if len(where):
            code = np.array([KINDS.index(kind) for kind in kinds[where]], np.int8)
            layer, unit = (column[where].astype(np.int32) for column in (layers, units))
            edits = Edits(code, layer, np.zeros_like(layer), unit, groups[:, : len(base.ids)])

            def done(some: np.ndarray, found: Tensor) -> None:
                rewards[torch.from_numpy(where[some])] = found.to(rewards)

            budget = _budget(rm, patcher, base, edits, None)
            patcher.rewards(base, edits, rows, budget, done, np.zeros(len(edits), bool))
    return base.reward.clone(), other.reward.clone() if other is not None and known else None, rewards.clone()


def _check_places(rm: RewardModel, places: list[tuple[str, int, Any]], heads: int | None = None) -> None:
    """_Outside unless reward-lens' modules for kinds and layers are those at which rmfast has them."""
    patcher = rm._patcher()
    for kind, layer, module in places:
        if isinstance(patcher, SuffixPatcher):
            fused = patcher.engine.layers[layer][1]
            same = module is {"attn_out": fused.attn, "mlp_out": fused.mlp, "head_out": fused.attn.o_proj}[kind]
        else:
            point = patcher.points[layer].get(kind)
            same = (
                point is not None and point.module is module and point.side == ("in" if kind == "head_out" else "out")
            )
        if not same:
            raise _Outside(f"{kind} of layer {layer} is another place in rmfast")
    if heads is not None and patcher.units("head_out")[0] != heads:
        raise _Outside(f"{patcher.units('head_out')[0]} heads, which reward-lens takes for {heads}")


def _components(layers: int) -> list[Cell]:
    return [(kind, layer, 0) for layer in range(layers) for kind in ("attn_out", "mlp_out")]


def _heads(layers: int, heads: int) -> list[Cell]:
    return [("head_out", layer, head) for layer in range(layers) for head in range(heads)]


# PatchGrid ------------------------------------------------------------------------------------------------------------


class _Known:
    """Stands for a patch whose rewards, by the text that is patched, are known."""

    def __init__(self, rewards: dict[Any, float]):
        self.rewards = rewards

    def compile(self, signal: Any) -> _Known:
        return self


def _known_or(original: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    @functools.wraps(original)
    def run_patched_scores(signal: Any, compiled: Any, view: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if isinstance(compiled, _Known):
            return np.array([compiled.rewards[item] for item in view], np.float32)
        return original(signal, compiled, view, *args, **kwargs)

    return run_patched_scores


def _measure(original: Callable[..., Any], self: Any, ctx: Any) -> Any:
    """Runs all patches, then has PatchGrid's own code read their rewards and make its evidence of them."""
    patch, classifier = _module("measure.battery.patch"), _module("signals.classifier")
    signal = ctx.signal
    if type(self) is not patch.PatchGrid or type(signal) is not classifier.ClassifierRM:
        raise _Outside(f"{type(self).__name__} of {type(signal).__name__}")
    if signal._interventions:
        raise _Outside("interventions on the signal")
    if iter(ctx.view) is ctx.view:
        raise _Outside("a view that can be read once only")
    runtime, layers, heads = signal.runtime, int(signal.meta.n_layers), int(signal.meta.n_heads or 0)
    rm = _bound(runtime)
    by_head = self.granularity == "head"
    cells = _heads(layers, heads) if by_head else _components(layers)
    _check_places(rm, _places(runtime, cells), heads if by_head else None)
    weights = _readout(rm, runtime, signal.policy, signal.readout(ctx.readout))

    scores: dict[Any, float] = {}
    grids: dict[Any, dict[Any, list[float]]] = {}  # by the rejected text, then by the chosen one
    tokenize = lru_cache(maxsize=None)(lambda item: _ids(signal.tokenize(item)))
    for chosen, rejected in zip(*patch.pair_sides(ctx.view)):
        ids, other = tokenize(chosen), tokenize(rejected)
        if not len(ids) or not len(other):
            raise _Outside("an empty text")
        span = slice(0, min(len(ids), len(other)))
        *two, rewards = _patched(rm, (ids, len(ids) - 1), (other, len(other) - 1), cells, span)
        scores[chosen], scores[rejected] = (float(x.double() @ weights) for x in two)  # type: ignore[union-attr]
        grids.setdefault(rejected, {})[chosen] = (rewards.double() @ weights).tolist()

    def score(signal: Any, items: list[Any], readout: str) -> np.ndarray:
        return np.array([scores[item] for item in items], np.float32)

    def patches(signal: Any, rejected: Any, n_layers: int, n_heads: int) -> list[_Known]:
        each = grids[rejected]
        return [_Known({chosen: rewards[j] for chosen, rewards in each.items()}) for j in range(len(cells))]

    served = copy.copy(self)
    served._score, served._patches = score, patches
    return original(served, ctx)


def _places(runtime: Any, cells: list[Cell]) -> list[tuple[str, int, Any]]:
    hooks, site = _module("runtime.hooks"), _module("core.types").Site
    places = []
    for kind, layer in dict.fromkeys(cell[:2] for cell in cells):
        at = site(layer, kind, None) if kind == "head_out" else site(layer, kind)
        if at not in runtime.site_map.module_paths:
            raise _Outside(f"no {kind} in layer {layer}")
        places.append((kind, layer, hooks.resolve_module(runtime.model, runtime.site_map.resolve(at))))
    return places


def _readout(rm: RewardModel, runtime: Any, policy: Any, readout: Any) -> Tensor:
    """(K,) fp64: the readout as a sum over the head's labels."""
    linear = _model.plain_linear(rm.binding.head)
    if linear is None or linear is not _model.active(runtime.head_module):
        raise _Outside("the head is not one readable Linear")
    if type(policy) is not _module("runtime.precision").NumericsPolicy or policy.head_dtype != "float32":
        raise _Outside("a numerics policy of its own")
    weight = linear.weight.detach().float()
    labels, row = weight.size(0), readout.meta.get("row")
    weights = torch.full((labels,), 1 / labels, dtype=torch.float64)
    if row is not None:
        weights = torch.nn.functional.one_hot(torch.tensor(row), labels).double()
    bias = 0.0 if linear.bias is None else float(linear.bias.detach().double().cpu() @ weights)
    vector, at = readout.vector.to(weight), readout.meta.get("bias", 0.0)
    if not torch.allclose(weights.to(weight) @ weight, vector, rtol=1e-5, atol=1e-6 * float(vector.abs().max())):
        raise _Outside("a readout that is neither a row of the head nor their mean")
    if abs(bias - at) > 1e-6 * max(1.0, abs(bias)):
        raise _Outside("a readout with another bias than the head's")
    return weights


# reward-lens' RewardModel ---------------------------------------------------------------------------------------------

# By wrapper: the adapter and functions that make its reward, and whether that is rm.score's.
_agrees: weakref.WeakKeyDictionary[Any, tuple[weakref.ref, list, bool]] = weakref.WeakKeyDictionary()


def _wrapped(wrapper: Any) -> RewardModel:
    """Its model, bound, and its reward known to be the first label where `rm.score` reads it."""
    adapter = wrapper.adapter
    if not type(adapter).__module__.startswith("reward_lens."):
        raise _Outside("an adapter of its own")
    rm = _bound(wrapper)
    makers = [getattr(f, "__func__", f) for f in (adapter.extract_reward, adapter.extract_reward_batch)]
    known = _agrees.get(wrapper)
    if known is None or known[0]() is not adapter or known[1] != makers:
        known = _agrees[wrapper] = weakref.ref(adapter), makers, _reads_first_label(wrapper, rm)
    if not known[2]:
        raise _Outside("its adapter makes the reward in another way")
    return rm


def _reads_first_label(wrapper: Any, rm: RewardModel) -> bool:
    """Tried on a few tokens, forwards and backwards and with padding at the end, as another rule may read it."""
    ids = _model._probe_ids(rm.binding.root, rm.binding.vocab_size, None, ())
    texts = [ids, ids.flip(1), torch.cat([ids, torch.full_like(ids[:, :1], _model.pad_id(rm.binding))], 1)]
    values, wanted = [], []
    for text in texts:
        inputs = {"input_ids": text.to(wrapper.device), "attention_mask": torch.ones_like(text).to(wrapper.device)}
        try:
            with torch.no_grad():
                out = wrapper.model(**inputs)
                one, batch = (
                    f(out, inputs).detach().double().cpu().reshape(())
                    for f in (wrapper.adapter.extract_reward, wrapper.adapter.extract_reward_batch)
                )
        except (RuntimeError, ValueError, AttributeError, IndexError, TypeError):
            return False
        wanted += [one, batch]
        values += [_score(rm, text[0].numpy())] * 2
    got = torch.tensor(values, dtype=torch.float64)
    # Another rule is off by the rewards' own size, bf16 by a percent of their scale.
    with torch.no_grad():
        return bool(((got - torch.stack(wanted)).abs() <= 0.03 * _model._scale(rm.binding, got)).all())


def _score(rm: RewardModel, ids: np.ndarray) -> float:
    return float(rm._run([Encoded(ids)], [np.array([rm._position(ids, 0, None)])], None, False, None)[0][0, 0])


def _text(rm: RewardModel, inputs: dict[str, Tensor]) -> tuple[np.ndarray, int]:
    """Token ids of the one text in a wrapper's inputs, and where the model reads its reward."""
    ids = inputs["input_ids"]
    if ids.size(0) != 1 or not ids.size(1):
        raise _Outside("several texts, or none: run as the one batch that they are")
    if inputs.keys() - {"input_ids", "attention_mask"}:
        raise _Outside(f"inputs beside token ids ({', '.join(sorted(inputs))})")
    if "attention_mask" in inputs and not bool(inputs["attention_mask"].all()):
        raise _Outside("a text whose attention mask leaves tokens out")
    row = ids[0].cpu().numpy()
    return row, rm._position(row, 0, None)


_STREAMS = ("resid_post", "attn_out", "mlp_out")


def _activations(
    wrapper: Any, inputs: dict[str, Tensor], rows: slice, heads: bool
) -> tuple[Tensor, dict[str, dict[int, Tensor]]]:
    """Rewards (1,) and activations (1, rows, ...) by kind and layer; the embedding is resid_post of layer −1."""
    rm = _wrapped(wrapper)
    ids, read = _text(rm, inputs)
    if read != len(ids) - 1:
        raise _Outside("the reward is read before the last token")
    if any(rm.binding.length_group(len(ids))):
        raise _Outside("rotary frequencies that depend on a text's length")
    _engine(rm)
    patcher = rm._patcher()
    if not isinstance(patcher, SuffixPatcher) or any(fused.sandwich for _, fused in patcher.engine.layers):
        raise _Outside("layers that are not Llama's by structure")
    adapter, layers = wrapper.adapter, range(patcher.layers)
    modules = adapter.get_layers(wrapper.model)
    if len(modules) != patcher.layers:
        raise _Outside("other layers than rmfast's")
    at = {"attn_out": adapter.get_attn_module, "mlp_out": adapter.get_mlp_module, "head_out": adapter.get_attn_o_proj}
    kinds = [*_STREAMS, *(["head_out"] if heads else [])]
    places = [(kind, layer, at[kind](modules[layer])) for kind in kinds if kind in at for layer in layers]
    _check_places(rm, places, wrapper.n_heads if heads else None)
    with rm.binding.session():
        record = patcher.record(Encoded(ids), read, set(kinds), base=False)
        found = {kind: {i: record.activations(kind, i)[rows] for i in layers} for kind in kinds}
    with torch.no_grad():
        embedded = adapter.get_embedding(wrapper.model)(inputs["input_ids"][:, rows])
        out: dict[str, dict[int, Tensor]] = {"resid_post": {-1: embedded}}
        for kind, each in found.items():  # outside of inference mode: ordinary tensors, of these rows alone
            named = {i: (x if kind == "head_out" else x[:, 0])[None].clone() for i, x in each.items()}
            out.setdefault(kind, {}).update(named)
    return record.reward[:1].clone(), out


def _last(inputs: dict[str, Tensor]) -> slice:
    return slice(inputs["input_ids"].size(1) - 1, None)


def _cached(original: Any, self: Any, inputs: dict[str, Tensor], cache_full_sequences: bool = False) -> Any:
    reward, found = _activations(self, inputs, slice(None) if cache_full_sequences else _last(inputs), heads=False)
    cache = _module("model").ActivationCache()
    cache.final_token_positions = torch.full_like(inputs["input_ids"][:, 0], inputs["input_ids"].size(1) - 1)
    streams = (cache.residual_streams, cache.attn_outputs, cache.mlp_outputs)
    whole = (cache.raw_residual_streams, cache.raw_attn_outputs, cache.raw_mlp_outputs)
    for kind, last, full in zip(_STREAMS, streams, whole):
        last.update({layer: x[:, -1] for layer, x in found[kind].items()})
        full.update(found[kind] if cache_full_sequences else {})
    return float(reward), cache


def _cached_batch(original: Any, self: Any, inputs: dict[str, Tensor], capture_heads: bool = False) -> Any:
    reward, found = _activations(self, inputs, _last(inputs), heads=capture_heads)
    cache = _module("model").BatchedActivationCache()
    cache.final_token_positions = torch.full_like(inputs["input_ids"][:, 0], inputs["input_ids"].size(1))
    for kind, last in zip(_STREAMS, (cache.residual_streams, cache.attn_outputs, cache.mlp_outputs)):
        last.update({layer: x[:, -1] for layer, x in found[kind].items()})
    if capture_heads:
        cache.attn_head_outputs.update({layer: x[:, -1] for layer, x in found["head_out"].items()})
    return cache, reward.float().to(self.device)


# ActivationPatcher (2.0.1) --------------------------------------------------------------------------------------------


def _patched_pair(
    patcher: Any,
    prompt: str,
    answers: tuple[str, str],
    mode: str,
    max_length: int,
    values: Callable[[], dict[tuple[str, int], Tensor]] | None = None,
) -> Any:
    """One of its grids as its result: mode "noising", "denoising", "zero", "mean" (with values) or "head-..."."""
    module, wrapper = _module("patching"), patcher.model
    own, known = type(patcher), module.ActivationPatcher
    if own._patch_component is not known._patch_component or own._patch_one_head is not known._patch_one_head:
        raise _Outside(f"{own.__name__} patches in its own way")
    if not isinstance(wrapper, _module("model").RewardModel):
        raise _Outside(f"a model that is a {type(wrapper).__name__}")
    rm = _wrapped(wrapper)
    preferred, dispreferred = (
        _text(rm, wrapper.tokenize_conversation(prompt, answer, max_length=max_length)) for answer in answers
    )
    by_head, paired = mode.startswith("head-"), mode.endswith("noising")
    adapter, modules = wrapper.adapter, wrapper.adapter.get_layers(wrapper.model)
    cells = _heads(len(modules), wrapper.n_heads) if by_head else _components(len(modules))
    if by_head:
        places = [("head_out", i, adapter.get_attn_o_proj(layer)) for i, layer in enumerate(modules)]
    else:
        parts = (("attn_out", adapter.get_attn_module), ("mlp_out", adapter.get_mlp_module))
        places = [(kind, i, get(layer)) for i, layer in enumerate(modules) for kind, get in parts]
    _check_places(rm, places, wrapper.n_heads if by_head else None)
    base, other = (dispreferred, preferred) if mode.endswith("denoising") else (preferred, dispreferred)
    replaced: int | slice = slice(None)  # heads behind the end of the other text are zeroed, components are left
    if paired and not by_head:
        replaced = slice(0, min(len(base[0]), len(other[0])))
    if values is not None:
        rm_patcher = rm._patcher()
        if isinstance(rm_patcher, SuffixPatcher) and any(fused.sandwich for _, fused in rm_patcher.engine.layers):
            raise _Outside("means before the norm behind attention and MLP")
        replaced = len(base[0]) - 1
    found, theirs, rewards = _patched(
        rm, base, other if paired else None, cells, replaced, None if values is None else values()
    )
    base_reward = float(found[0])
    other_reward = _score(rm, other[0]) if theirs is None else float(theirs[0])
    sign = -1 if mode.endswith("denoising") else 1
    original = sign * (base_reward - other_reward)
    kinds = {"attn_out": "attn", "mlp_out": "mlp", "head_out": "attn_head"}
    short = {**kinds, "head_out": "head"}
    return module.PatchingResult(
        component_names=[f"{short[k]}_L{i}" + (f"_H{unit}" if by_head else "") for k, i, unit in cells],
        component_types=[kinds[k] for k, _, _ in cells],
        layer_indices=[i for _, i, _ in cells],
        patch_effects=np.array([original - sign * (reward - other_reward) for reward in rewards[:, 0].tolist()]),
        original_differential=original,
        patching_mode=mode,
    )


def _patch_all_components(
    original: Any, self: Any, prompt: str, preferred: str, dispreferred: str, mode: str = "noising",
    max_length: int = 2048, show_progress: bool = True, mean_corpus: Any = None,
) -> Any:  # fmt: skip
    if mode not in ("noising", "denoising", "zero"):
        raise _Outside(f"mode {mode!r}")  # "mean" comes back as patch_all_components_mean
    return _patched_pair(self, prompt, (preferred, dispreferred), mode, max_length)


def _patch_all_heads(
    original: Any, self: Any, prompt: str, preferred: str, dispreferred: str, mode: str = "noising",
    max_length: int = 2048, show_progress: bool = True,
) -> Any:  # fmt: skip
    if mode not in ("noising", "denoising"):
        raise _Outside(f"mode {mode!r}")
    return _patched_pair(self, prompt, (preferred, dispreferred), f"head-{mode}", max_length)


def _patch_all_components_mean(
    original: Any, self: Any, prompt: str, preferred: str, dispreferred: str, corpus_pairs: Any,
    max_length: int = 2048, show_progress: bool = True,
) -> Any:  # fmt: skip
    if not isinstance(corpus_pairs, list | tuple) or not corpus_pairs:
        raise _Outside("a corpus that is no list of pairs, or has none")

    def means() -> dict[tuple[str, int], Tensor]:
        total: dict[tuple[str, int], Tensor] = {}
        for pair in corpus_pairs:
            _, cache = self.model.forward_with_cache(*pair, cache_full_sequences=False, max_length=max_length)
            for kind, rows in (("attn_out", cache.attn_outputs), ("mlp_out", cache.mlp_outputs)):
                for layer, x in rows.items():
                    total[kind, layer] = total.get((kind, layer), 0) + x[0].float()
        return {place: x / len(corpus_pairs) for place, x in total.items()}

    return _patched_pair(self, prompt, (preferred, dispreferred), "mean", max_length, means)
