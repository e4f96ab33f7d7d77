"""What can be told of a module by looking: its wrappers and hooks, whether it can be read, what it takes and gives."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

# Whose hooks change nothing: transformers' own, which the first call with output_hidden_states leaves on all layers for
# good, and torch's that keep track of the module that runs (FlopCounterMode).
_WATCHERS = ("transformers.utils.output_capturing", "torch.utils.module_tracker")

PASSIVE = (nn.Dropout, nn.Identity, nn.Flatten)  # modules that change no value in eval mode


def modules_of(root: nn.Module) -> list[nn.Module]:
    """`root.modules()`, in its order, in a quarter of the time: the set-up of a run looks through them ten times."""
    found = {root: None}

    def visit(module: nn.Module) -> None:
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                if child._modules:
                    visit(child)

    visit(root)
    return list(found)


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """`root.parameters()` likewise, of `modules_of(root)`."""
    found = (p for module in modules for p in module._parameters.values())
    return list(dict.fromkeys(p for p in found if p is not None))


def own_attribute(module: nn.Module, name: str) -> Any:
    """What lies under a name on a module, its class or among its parts; None: nothing.

    As `getattr(module, name, None)`, but for the error that `nn.Module.__getattr__` makes of a name that is not there,
    which costs more than all the rest of a search through a model.
    """
    if name in module.__dict__ or name in module._modules or hasattr(type(module), name):
        return getattr(module, name, None)
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile and peft wrappers. Adapters live in its layers and stay active."""
    model = uncompiled(model)
    peft: Any = model
    if hasattr(peft, "peft_config") and callable(getattr(peft, "get_base_model", None)):
        for config in peft.peft_config.values():
            if getattr(config, "is_prompt_learning", False):
                raise ValueError(
                    f"peft's {getattr(config.peft_type, 'value', config.peft_type)} adds tokens outside of the model's "
                    "layers, which rmfast does not run; adapters inside the layers (LoRA and its kin) work"
                )
        return peft.get_base_model()
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside a torch.compile wrapper."""
    return getattr(model, "_orig_mod", model)


def wrappers(model: nn.Module, root: nn.Module) -> list[nn.Module]:
    """What is called around the transformers model `root` inside of `model`, outermost first: peft's wrappers, of which
    there is one in another, but not torch.compile's."""
    outer = uncompiled(model)
    parts = next(name for name, module in outer.named_modules() if module is root).split(".")
    around = (outer.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    return [module for module in around if module is not root]


def entry_of(model: nn.Module, root: nn.Module) -> nn.Module:
    """What is called to run the model's own forward: its wrappers only where something is put on one of them."""
    return root if all(map(is_untouched, wrappers(model, root))) else uncompiled(model)


def expect_bare_compiled(model: nn.Module) -> None:
    """ValueError for hooks on torch.compile's wrapper, or a forward set on it: what is compiled is never run."""
    if uncompiled(model) is model:
        return
    own = hasattr(model.forward, "_torchdynamo_orig_callable")
    if not own or _taking_part(model._forward_pre_hooks, model._forward_hooks):
        raise ValueError(
            f"Expected torch.compile's wrapper of {type(uncompiled(model)).__name__} to be without hooks, and without "
            "a forward set on it: rmfast runs the model inside. Put them on that (model._orig_mod)"
        )


def text_config(model: nn.Module) -> Any:
    """The configuration of the model, or of its text part."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def input_embedding(model: nn.Module) -> Any:
    """The table of a transformers model's tokens; where it can't say, its first part's that can. None: it has none."""
    for module in model.modules():
        get = getattr(module, "get_input_embeddings", None)
        try:
            found = get() if callable(get) else None
        except NotImplementedError:  # transformers knows it by names, which a class of one's own may not have
            continue
        if isinstance(getattr(found, "weight", None), Tensor):
            return found
    return None


def active(module: Any) -> nn.Module:
    """The module in use: what peft's wrapper of saved modules or of norms has switched to, else the module itself."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        adapters = module.active_adapters
        if module.disable_adapters or not adapters or adapters[0] not in module.modules_to_save:
            return module.original_module
        return module.modules_to_save[adapters[0]]
    if hasattr(module, "ln_tuning_layers") and not (module.disable_adapters and module.merged):
        adapters = module.active_adapters
        if module.disable_adapters or module.merged or not adapters:
            return module.base_layer
        return module.ln_tuning_layers[adapters[0]] if len(adapters) == 1 else module
    return module


def plain_linear(head: list[nn.Module]) -> nn.Linear | None:
    """The one Linear that the head consists of, if its weight can be read: then norm and head are one fused op.

    Looked up at every call, since peft switches the modules it saved between adapters.
    """
    modules = [module for module in head if not isinstance(module, PASSIVE)]
    if len(modules) != 1 or not all(map(is_untouched, head)):
        return None
    module = active(modules[0])
    if type(module) is not nn.Linear or not is_untouched(module):
        return None
    return module if is_readable(module) else None


def is_readable(module: nn.Module) -> bool:
    """Whether its parameters are ordinary numbers in memory: not offloaded to meta, not quantised tensor subclasses."""
    return all(type(p.data) is Tensor and p.is_floating_point() and not p.is_meta for p in module.parameters())


def is_plain(module: nn.Module) -> bool:
    """Whether nobody put anything around its forward: hooks, or one set on the instance (accelerate, kernels)."""
    return not has_hooks(module) and "forward" not in module.__dict__


def is_transformers(module: nn.Module) -> bool:
    """Whether its code is transformers' own, and no class of another package, or of a checkpoint, overrides a part."""
    code = {kind.__module__.split(".")[0] for kind in type(module).__mro__}
    return "transformers" in code and code <= {"transformers", "torch", "builtins"}


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of it gives what its class' forward gives: no hooks, and no other forward but accelerate's."""
    return not has_hooks(module) and own_forward(module) is None


def own_forward(module: nn.Module) -> Any:
    """The forward that somebody set on the instance (kernel libraries do), or None.

    A session's own is not there (`rmfast.binding.session.replaced_forward`), nor accelerate's, which moves weights and
    inputs and changes no value.
    """
    forward: Any = module.__dict__.get("forward")
    forward = getattr(forward, "instead_of", forward)
    if getattr(getattr(forward, "func", None), "__module__", None) != "accelerate.hooks":
        return forward
    hook: Any = module._hf_hook
    if any(type(each).__module__ != "accelerate.hooks" for each in (hook, *getattr(hook, "hooks", ()))):
        return forward
    old: Any = module._old_forward
    return None if getattr(old, "__func__", None) is type(module).forward else old


def has_hooks(module: nn.Module) -> bool:
    """Whether it has forward hooks that do something, or all modules have (torch's global ones)."""
    return bool(hooks_of(module))


def hooks_of(module: nn.Module) -> tuple[Callable, ...]:
    """The forward hooks that take part in a call of it, torch's global ones first; not those that only watch."""
    return _taking_part(
        _torch_module._global_forward_pre_hooks,
        _torch_module._global_forward_hooks,
        module._forward_pre_hooks,
        module._forward_hooks,
    )


def _taking_part(*owners: dict[int, Callable]) -> tuple[Callable, ...]:
    return tuple(
        hook for hooks in owners if hooks for hook in hooks.values() if getattr(hook, "__module__", "") not in _WATCHERS
    )


_CONTAINERS = (dict, list, tuple, set)
_EVERY_MODULE = {*nn.Module().__dict__, "forward"}  # parts, weights, hooks and the mode, which have keys of their own


def settings_of(module: Any) -> list[Any]:
    """What a module or a configuration holds beside parts and weights: numbers, words, functions; also inside of its
    lists and dicts. For `same_settings`."""
    found: list[Any] = []
    for name, value in _held(module).items():
        if name in _EVERY_MODULE:
            continue
        if isinstance(value, _CONTAINERS):
            found += _leaves(value)
        else:
            found.append(value)
    return found


def _held(module: Any) -> dict[str, Any]:
    return getattr(module, "__dict__", {})


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item]
    elif not isinstance(value, _CONTAINERS):
        yield value
        return
    yield type(value)  # an empty one is something, too
    for part in value:
        yield from _leaves(part)


def same_settings(held: list[Any], now: list[Any]) -> bool:
    """Compared one by one with `is`: a number that is set anew is another object."""
    return len(held) == len(now) and all(map(_is_same, held, now))


def _is_same(held: Any, now: Any) -> bool:
    return held is now or (type(held) is _Writes and type(now) is _Writes and held.key == now.key)


class _Writes:
    """How often a tensor has been written to, where it lies, and of what it is."""

    def __init__(self, x: Tensor) -> None:
        self.key = None if x.is_inference() else x._version, x.data_ptr(), x.dtype, x.device


def structure_of(root: nn.Module) -> tuple:
    """A model's modules and what is put on them, as a key."""
    return tuple((module, own_forward(module), has_hooks(module)) for module in modules_of(root))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model as it was when something was made of it: modules, hooks, settings, and which tensors its weights are; of
    some modules also that these have not been written to, as far as torch counts that (not through `.data`)."""

    root: nn.Module
    watched: tuple[nn.Module, ...]
    structure: tuple
    held: list[Any]

    @classmethod
    def of(cls, root: nn.Module, watched: Iterable[nn.Module]) -> Snapshot:
        watched = tuple(watched)
        return cls(root, watched, structure_of(root), _held_by(root, watched))

    @property
    def changed(self) -> bool:
        now = _held_by(self.root, self.watched)
        return self.structure != structure_of(self.root) or not same_settings(self.held, now)

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshot:
        root, watched = copy.deepcopy(self.root, memo), copy.deepcopy(self.watched, memo)
        return Snapshot(root, watched, (), []) if self.changed else Snapshot.of(root, watched)


def _held_by(root: nn.Module, watched: tuple[nn.Module, ...]) -> list[Any]:
    held: list[Any] = []
    for module in modules_of(root):
        if own_attribute(module, "rope_type") is None:  # which keeps what the last text was
            held += [*settings_of(module), *module._parameters.values(), *module._buffers.values()]
    return held + [_Writes(p) for module in watched for p in module._parameters.values() if p is not None]


def calls_of(module: nn.Module) -> tuple:
    """What a call of it runs around its parts, as a key: its class' forward, one set on the instance, hooks."""
    return type(module).forward, own_forward(module), hooks_of(module)


def call_arguments(
    module: nn.Module, input_ids: Tensor, attention_mask: Tensor, types: Tensor | None
) -> dict[str, Any]:
    """Arguments for a body's or model's forward: those that it takes."""
    accepted = inspect.signature(type(module).forward).parameters
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if types is not None and "token_type_ids" in accepted:
        inputs["token_type_ids"] = types
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def hidden_state_of(out: Any) -> Tensor:
    """The hidden states (B, T, d) in what a body returns."""
    state = getattr(out, "last_hidden_state", None)
    if state is None:
        state = out[0] if isinstance(out, tuple | list) else out
    return state


def logits_of(out: Any) -> Tensor | None:
    """The logits in what a model returns, or None."""
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    return found if isinstance(found, Tensor) and found.dim() >= 1 else None


def fingerprint(root: nn.Module, more: Mapping[str, Tensor] | None = None) -> str:
    """Of an architecture and a sample of its weights: 64 to 127 values of each parameter (or all of fewer), in bf16;
    `more` are tensors beside them.

    In bf16, so that what was made with a model in fp32 is known as the same one's in bf16.
    """
    digest = hashlib.sha256(type(root).__name__.encode())
    for name, p in [*root.named_parameters(), *(more or {}).items()]:
        digest.update(f"{name} {tuple(p.shape)}".encode())
        if p.numel() and not p.is_meta and p.is_floating_point():
            some = p.detach().reshape(-1)[:: max(1, p.numel() // 64)].bfloat16().double().cpu().numpy()
            digest.update(np.ascontiguousarray(some).tobytes())
    return digest.hexdigest()
