"""Edges as anyone would run them: hooks on the unmodified model, one head at a time, sums of senders written out.

The truth that edge attribution and circuits are judged by: nothing here is from rmfast but the words for nodes.
Parts are named class by class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import oracle as O
import torch
from torch import Tensor, nn

from rmfast.circuits.nodes import Node

_LLAMA = {
    "attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "mlp": "mlp",
}  # fmt: skip
_PLACES: dict[str, dict[str, str]] = {
    "LlamaDecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Gemma2DecoderLayer": _LLAMA | {
        "mlp_norm": "pre_feedforward_layernorm", "behind": "post_attention_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
    "GPT2Block": {"attn_norm": "ln_1", "qkv": "attn.c_attn", "o": "attn.c_proj", "mlp_norm": "ln_2", "mlp": "mlp"},
    "GPTNeoXLayer": {
        "attn_norm": "input_layernorm", "qkv": "attention.query_key_value", "o": "attention.dense",
        "mlp_norm": "post_attention_layernorm", "mlp": "mlp",
    },
    "PhiDecoderLayer": _LLAMA | {"o": "self_attn.dense", "mlp_norm": "input_layernorm"},
}  # fmt: skip
PARALLEL = ("GPTNeoXLayer", "PhiDecoderLayer")

Reads = Callable[[Node, Tensor], Tensor]  # what a receiver reads, (T, d), from what the model gives it there
Writes = Callable[[Node, Tensor], None]  # what a sender writes, (T, d)


def run(
    model: Any, ids: Sequence[int], reads: Reads = lambda node, x: x, writes: Writes = lambda node, z: None,
    embedding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The reward (K,) at the last token, each receiver reading its own stream."""
    blocks = O.layers(model)
    with ExitStack() as stack:

        def on(module: nn.Module, hook: Callable, before: bool = False) -> None:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback((register(hook, with_kwargs=True) if before else register(hook)).remove)

        def given(args: tuple, kwargs: dict) -> Any:
            return args[0] if args else kwargs["hidden_states"]

        def entered(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            x = given(args, kwargs) if embedding is None else embedding[None]
            writes(Node("embedding"), x[0])
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        on(blocks[0], entered, before=True)
        for index, block in enumerate(blocks):
            _Block(index, block, reads, writes, on, given)

        def leaving(module: nn.Module, args: tuple, out: Any) -> Any:
            x = reads(Node("reward"), (out[0] if isinstance(out, tuple) else out)[0])[None]
            return (x, *out[1:]) if isinstance(out, tuple) else x

        on(blocks[-1], leaving)
        return model(input_ids=torch.tensor([list(ids)])).logits[0]


class _Block:
    def __init__(self, index: int, block: nn.Module, reads: Reads, writes: Writes, on: Callable, given: Callable):
        self.index, self.block, self.reads, self.writes = index, block, reads, writes
        places = _PLACES[type(block).__name__]
        self.parts = {name: block.get_submodule(place) for name, place in places.items()}
        self.heads, self.kv, self.size = O._sizes(block)
        self.stream = self.middle = self.z = None
        on(block, self._enter(given), before=True)
        for name in ("q", "k", "v", "qkv"):
            if name in self.parts:
                on(self.parts[name], lambda module, args, out, name=name: self._project(name, out))
        on(self.parts["o"], lambda module, args, kwargs: self._heads(args[0][0]), before=True)
        if "behind" in self.parts:
            on(self.parts["behind"], lambda module, args, kwargs: self._behind(args[0][0]), before=True)
        on(self.parts["mlp_norm"], lambda module, args, kwargs: self._middle(args[0][0]), before=True)
        on(self.parts["mlp"], lambda module, args, kwargs: self._mlp(args, kwargs), before=True)
        on(self.parts.get("mlp_out", self.parts["mlp"]), lambda m, args, out: writes(Node("mlp_out", index), out[0]))

    def _enter(self, given: Callable) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.stream = given(args, kwargs)[0]

        return hook

    def _middle(self, x: Tensor) -> None:
        self.middle = self.stream if type(self.block).__name__ in PARALLEL else x

    def _project(self, name: str, out: Tensor) -> Tensor:
        """Each head's columns of the projection of its own stream."""
        module, norm, made = self.parts[name], self.parts["attn_norm"], torch.empty_like(out)
        for kind in name:
            for head in range(self.heads if kind == "q" else self.kv):
                x = self.reads(Node(f"{kind}_input", self.index, head), self.stream)
                columns = O._columns(self.block, kind, head, out.size(-1))
                made[0, :, columns] = module.forward(norm.forward(x[None]))[0, :, columns]
        return made

    def _written(self) -> Tensor:
        """(H, T, d): the output projection's columns of each head, without its bias."""
        out, d = self.parts["o"], self.size
        weight = out.weight.T if isinstance(out, nn.Linear) else out.weight
        return torch.stack([self.z[:, h * d : (h + 1) * d] @ weight[h * d : (h + 1) * d] for h in range(self.heads)])

    def _heads(self, x: Tensor) -> None:
        self.z = x
        if "behind" not in self.parts:
            self._write(self._written())

    def _behind(self, x: Tensor) -> None:
        norm = self.parts["behind"]
        self._write(self._written() * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (1 + norm.weight))

    def _write(self, written: Tensor) -> None:
        for head, z in enumerate(written):
            self.writes(Node("head_out", self.index, head), z)

    def _mlp(self, args: tuple, kwargs: dict) -> Any:
        x = self.reads(Node("mlp_input", self.index), self.middle)
        new = self.parts["mlp_norm"].forward(x[None])
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


def written(model: Any, ids: Sequence[int]) -> tuple[dict[Node, Tensor], Tensor]:
    """What each sender writes, and the reward (K,)."""
    found: dict[Node, Tensor] = {}
    with torch.no_grad():
        reward = run(model, ids, writes=lambda node, z: found.update({node: z.clone()}))
    return found, reward


def gradients(model: Any, ids: Sequence[int], embedding: Tensor | None = None, label: int = 0) -> dict[Node, Tensor]:
    """The reward's gradient in what each receiver reads, (T, d)."""
    leaves: dict[Node, Tensor] = {}

    def reads(node: Node, x: Tensor) -> Tensor:
        leaves[node] = torch.zeros_like(x).requires_grad_()
        return x + leaves[node]

    reward = run(model, ids, reads, embedding=embedding)[label]
    found = torch.autograd.grad(reward, list(leaves.values()), allow_unused=True)
    return {node: torch.zeros_like(leaves[node]) if g is None else g for node, g in zip(leaves, found)}


def sees(model: Any, sender: Node, receiver: Node) -> bool:
    """Whether a receiver reads a sender."""
    if sender.kind == "embedding" or receiver.kind == "reward":
        return True
    parallel = type(O.layers(model)[0]).__name__ in PARALLEL
    same = receiver.kind == "mlp_input" and sender.kind == "head_out" and not parallel
    return sender.layer < receiver.layer or (same and sender.layer == receiver.layer)


def scores(model: Any, clean: Sequence[int], corrupted: Sequence[int], way: Sequence[float] = (0.0,)) -> dict:
    """(z' − z) · the mean gradient, by (sender, receiver)."""
    (own, _), (other, _) = written(model, clean), written(model, corrupted)
    start, step = own[Node("embedding")], other[Node("embedding")] - own[Node("embedding")]
    each = [gradients(model, clean, start + share * step) for share in way]
    mean = {node: sum(g[node] for g in each) / len(each) for node in each[0]}
    return {(u, v): float(((other[u] - own[u]) * mean[v]).sum()) for u in own for v in mean if sees(model, u, v)}


def ablated(model: Any, clean: Sequence[int], other: dict[Node, Tensor], rest: Tensor, kept: set) -> Tensor:
    """The reward (K,) of a circuit.

    Args:
        other: what excluded senders write.
        rest: (d,), what no sender writes (output projections' biases), by layer.
    """
    now: dict[Node, Tensor] = {}

    def reads(node: Node, x: Tensor) -> Tensor:
        total = sum(now[u] if (u, node) in kept else other[u] for u in other if sees(model, u, node))
        layers = len(O.layers(model)) if node.kind == "reward" else node.layer
        own = node.kind == "mlp_input" and type(O.layers(model)[0]).__name__ not in PARALLEL
        return total + rest[: layers + own].sum(0)

    with torch.no_grad():
        return run(model, clean, reads, lambda node, z: now.update({node: z.clone()}))


def biases(model: Any) -> Tensor:
    """(L, d), of the output projections."""
    found = []
    for block in O.layers(model):
        bias = getattr(block.get_submodule(_PLACES[type(block).__name__]["o"]), "bias", None)
        found.append(torch.zeros(model.config.hidden_size, dtype=torch.float64) if bias is None else bias.detach())
    return torch.stack(found)
