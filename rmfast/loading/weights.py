"""Whether a model that transformers made has the weights of its checkpoint, all of them and no others.

A name without weights in the file, or with weights of another shape, transformers fills with random numbers and logs; a
name of the file that the model has no place for it leaves out. Both give a reward, and a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.find import probe_ids
from rmfast.binding.modules import call_arguments, logits_of

_COMPUTED = (
    "inv_freq",
    "position_ids",
    "masked_bias",
)  # buffers that old checkpoints hold and that are the same for each


def check_weights(path: Any, model: nn.Module, info: dict[str, Any], replaced: frozenset[str]) -> None:
    """Refuse, by name, a model whose reward depends on numbers that are not the checkpoint's.

    Args:
        info: what from_pretrained gives with output_loading_info.
        replaced: names whose weights come from elsewhere.

    Raises:
        ValueError: a weight that plays a part in the reward is missing or of another shape, or one is left out that is
            of no whole module beside the body and the head (an lm_head, a v_head).
    """
    shapes = {name: (tuple(file), tuple(own)) for name, file, own in info["mismatched_keys"] if name not in replaced}
    made_up = ({*info["missing_keys"]} - replaced) | set(shapes)
    made_up -= _unused(model, made_up)
    kind, unplaced = type(model).__name__, sorted(info["unexpected_keys"])
    missing = sorted(made_up - set(shapes))
    if missing:
        inside = f"{getattr(model, 'base_model_prefix', '')}."
        of_head = all(not name.startswith(inside) for name in missing)
        there = [name for name in unplaced if not name.startswith(inside)] or unplaced
        raise ValueError(
            (
                f"{path} is not a reward model: it has no weights for its head, "
                if of_head
                else f"{path} has no weights for "
            )
            + f"{listed(missing)} of {kind}, which transformers would fill with random numbers"
            + (f"; what it has under other names: {listed(there)}" if there else "")
        )
    if shapes.keys() & made_up:
        name, *more = sorted(shapes.keys() & made_up)
        file, own = shapes[name]
        labels = model.config.num_labels if own[0] != file[0] else None  # type: ignore[union-attr]
        raise ValueError(
            f"Expected {name} of shape {own}, for {kind}"
            + (f" with num_labels={labels}" if labels == own[0] else "")
            + f", got {file} in {path}"
            + (f"; so do {listed(more)} differ" if more else "")
        )
    if not getattr(model, "is_quantized", False):  # scales and the like are the quantiser's business
        expect_none_left_out(path, model, unplaced)


def expect_none_left_out(path: Any, model: nn.Module, names: Iterable[str]) -> None:
    """ValueError for names of a file that the model has no place for and that would have had a part in the reward."""
    left_out = sorted(name for name in names if _is_part(model, name))
    if left_out:
        kind = type(model).__name__
        raise ValueError(f"{path} has {listed(left_out)}, which {kind} has no place for and would be scored without")


def restore_buffers(model: nn.Module, info: dict[str, Any]) -> None:
    """Give a model of the checkpoint's own code the buffers that its constructor computes and no file holds.

    transformers makes models without memory, and then gives such buffers memory as it comes, but for those of its own
    rotary embeddings: what a checkpoint's own code computes (frequencies, scales of rewards) would be other numbers at
    each load. The constructor is run once more, with parameters alone on meta.
    """
    if not type(model).__module__.startswith("transformers_modules."):
        return
    ignored = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ["(?!)"]))  # none: nothing
    missing = {name for name in info["missing_keys"] if name.endswith(_COMPUTED)}
    saved = {name for name in model.state_dict() if name not in missing and not ignored.search(name)}
    with _parameters_on_meta(), torch.no_grad():
        made = dict(type(model)(model.config).named_buffers())  # type: ignore[arg-type]
    for name, buffer in model.named_buffers():
        if name not in saved and name in made and not buffer.is_meta:
            buffer.copy_(made[name])
            info["missing_keys"].discard(name)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New modules get parameters without memory, and buffers with values."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def listed(names: list[str]) -> str:
    """The first few of many names."""
    more = len(names) - 6
    return ", ".join(names[:6]) + (f" and {more} more" if more > 0 else "")


def _is_part(model: nn.Module, name: str) -> bool:
    """Whether a name of the file that the model has no place for would have had a part in the reward.

    It had none in another module at the top (lm_head), in an encoder's pooler where the model is made without, and in
    buffers that are computed.
    """
    if name.endswith(_COMPUTED) or name in dict(model.named_buffers()):  # GPT-2's masks, which it no longer saves
        return False
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, model) if prefix else model
    first, *rest = name.split(".")
    inside = rest if getattr(model, first, None) is body else [first, *rest]
    if inside[:1] == ["pooler"] and getattr(body, "pooler", None) is None:
        return False
    return not rest or any(isinstance(getattr(module, first, None), nn.Module) for module in (model, body))


def _unused(model: Any, names: Iterable[str]) -> set[str]:
    """Those that provably play no part in the reward: their module never runs, and NaN in them changes no logit."""
    if not names:
        return set()
    ids = probe_ids(model, model.get_input_embeddings().num_embeddings, None, ())
    ids = ids.to(model.get_input_embeddings().weight.device)

    def logits() -> Tensor | None:
        with torch.no_grad():
            return logits_of(model(**call_arguments(model, ids, torch.ones_like(ids), None)))

    called: set[str] = set()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
            stack.callback(hook.remove)
        try:
            before = logits()
        except Exception:
            return set()  # binding tells what is wrong with such a model
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    idle = {name for name in names if _never_runs(model, name, called) and name in weights}
    idle = {name for name in idle if weights[name].is_floating_point() and not weights[name].is_meta}
    kept = {name: weights[name].detach().clone() for name in idle}
    try:
        for name in idle:
            weights[name].data.fill_(torch.nan)
        after = logits()
    finally:
        for name in idle:
            weights[name].data.copy_(kept[name])
    return idle if before is not None and after is not None and torch.equal(before, after) else set()


def _never_runs(model: nn.Module, name: str, called: set[str]) -> bool:
    """Whether the weight's module was not called, nor is one of a list of which other tokens may call another."""
    parent, path = model, ""
    for part in name.split(".")[:-1]:
        path = f"{path}.{part}" if path else part
        child = getattr(parent, part)
        if path not in called and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            return not isinstance(parent, nn.ModuleList | nn.ModuleDict)
        parent = child
    return False
