"""Ensembles: several reward models or heads on the same texts, those that share a body in one run of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rmfast.arguments import number, sequence, shown, word
from rmfast.binding.binding import Binding
from rmfast.binding.modules import fingerprint, has_hooks, is_plain, is_readable
from rmfast.binding.session import lock_of
from rmfast.engine.options import ScoreOptions, takes
from rmfast.engine.scorer import Scorer
from rmfast.heads import rowwise
from rmfast.heads.tokens import TokenRows
from rmfast.texts.inputs import Encoded

if TYPE_CHECKING:
    from typing_extensions import Unpack

REDUCTIONS = ("mean", "min", "uwo", "soft_min")
# Settings of a configuration that say nothing of what its body runs.
_OF_HEADS = {
    "num_labels", "id2label", "label2id", "problem_type", "architectures", "_name_or_path", "name_or_path", "mean",
    "std", "transformers_version", "pad_token_id", "classifier_dropout", "torch_dtype", "dtype", "auto_map",
}  # fmt: skip


class EnsembleScores(NamedTuple):
    """What `Ensemble.score` gives, on the CPU.

    Attributes:
        rewards: (N,), reduced over the members.
        std: (N,), the members' standard deviation (of M members by M).
        members: (M, N), of each.
    """

    rewards: Tensor
    std: Tensor
    members: Tensor


@dataclass(frozen=True, eq=False)
class _Member:
    """A model, and the adapter that is switched on for it (None: whichever is)."""

    rm: Scorer
    adapter: str | None


class Ensemble:
    """Several reward models as one, by mean, worst case or with a penalty on their disagreement.

    Args:
        members: `RewardModel`s, and (RewardModel, "adapter") for one of several adapters in a peft model. A model of K
            rewards is K members.
        reduce: of the members' rewards r_i of a text "mean"; "min", the worst case; "uwo", mean − lam · Var_i r_i
            (arXiv 2310.02743; the variance of M members by M); "soft_min", −beta · log mean_i exp(−r_i / beta), the
            least for beta → 0 and the mean for beta → ∞.
        lam: of "uwo", at least 0.
        beta: of "soft_min", above 0.

    Members whose bodies have the same weights, to the bit, and configuration run once, also those of several
    checkpoints. Of others each runs by itself; texts are encoded once for all with the same tokenizer. A reward has the
    bits that its member gives alone: the ensemble's are the same in any batch where the members' are (`moves`).

    Raises:
        TypeError, ValueError: no members, one that is no RewardModel or has no such adapter, or a wrong argument.
    """

    def __init__(
        self, members: Sequence[Any], reduce: Literal["mean", "min", "uwo", "soft_min"] = "mean", *,
        beta: float = 1.0, lam: float = 0.5,
    ):  # fmt: skip
        self.reduce = word("reduce", reduce, REDUCTIONS)
        self.beta, self.lam = number("beta", beta, 0, above=True), number("lam", lam, 0)
        self.members = [_member(each) for each in sequence("members", members, "a sequence of RewardModels")]
        if not self.members:
            raise ValueError("Expected members of an ensemble, at least one, got none")
        _expect_own_heads(self.members)
        self._tokens = [_encoding_key(member.rm) for member in self.members]
        self._groups: list[list[int]] = []
        for i, member in enumerate(self.members):
            for group in self._groups:
                if _same_body(self.members[group[0]], member):
                    group.append(i)
                    break
            else:
                self._groups.append([i])
        self._versions = [_versions(member.rm.binding.body) for member in self.members]

    @property
    def size(self) -> int:
        """M, the rewards that are reduced."""
        return sum(member.rm.num_labels for member in self.members)

    @property
    def runs(self) -> int:
        """How often a body runs; once more for members that share one and read other tokens."""
        return len(self._groups)

    @property
    def same_ids(self) -> bool:
        """Whether a text has the same token ids for all members."""
        return len(set(self._tokens)) == 1

    def __repr__(self) -> str:
        more = {"uwo": f", lam={self.lam:g}", "soft_min": f", beta={self.beta:g}"}.get(self.reduce, "")
        return f"Ensemble({self.size} members, {self.runs} runs, reduce={self.reduce!r}{more})"

    def moves(self) -> str | None:
        """Why a text's rewards may have other bits beside other texts: see `RewardModel.moves`."""
        return next((why for member in self.members if (why := member.rm.moves()) is not None), None)

    @takes(ScoreOptions)
    def score(self, inputs: Sequence[Any], **options: Unpack[ScoreOptions]) -> EnsembleScores:
        """Rewards of all members and what they reduce to; arguments and errors are those of `RewardModel.score`."""
        encoding: dict[str, Any] = {**options}
        running = (encoding.pop("batch_tokens", None), encoding.pop("progress", False), encoding.pop("engine", None))
        encoded: dict[Any, list[Encoded]] = {}
        for member, key in zip(self.members, self._tokens):
            if key not in encoded:
                encoded[key] = member.rm.encode(inputs, **encoding)
        found: dict[int, Tensor] = {}
        for group in self._groups:
            pending = list(group)
            while pending:  # those that read the same tokens of the same ids, together
                first, key = self.members[pending[0]], self._tokens[pending[0]]
                items, read = encoded[key], first.rm.reads(encoded[key])
                flat = _flat(read)
                some = pending[:1]
                for i in pending[1:]:
                    alike = self._tokens[i] == key and self._still_same(pending[0], i)
                    if alike and np.array_equal(flat, _flat(self.members[i].rm.reads(items))):
                        some.append(i)
                with _adapter(first):
                    found |= zip(some, _run([self.members[i].rm for i in some], items, read, running))
                pending = [i for i in pending if i not in some]
        members = torch.cat([found[i] for i in range(len(self.members))], 1).T.contiguous()
        rewards, std = self.reduced(members)
        return EnsembleScores(rewards, std, members)

    def _still_same(self, one: int, other: int) -> bool:
        """Whether two bodies are equal as they were: weights may have been changed in place since."""
        a, b = (self.members[i].rm.binding.body for i in (one, other))
        if a is b:
            return True
        kept = [self._versions[i] for i in (one, other)] == [_versions(body) for body in (a, b)]
        return fingerprint(a) == fingerprint(b) and (kept or _equal(a, b))

    def reduced(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (N,) and standard deviations (N,) of members' rewards (M, N), summed in their order, in fp64."""
        wide, count = members.double(), len(members)
        mean, variance = moments(wide)
        if self.reduce == "mean":
            out = mean
        elif self.reduce == "uwo":
            out = mean - self.lam * variance
        else:
            least = wide.amin(0)
            if self.reduce == "soft_min":
                powers = [rowwise.each(torch.exp, (least - each) / self.beta) for each in wide]
                least = least - self.beta * (rowwise.each(torch.log, sum(powers[1:], powers[0])) - math.log(count))
            out = least
        return out.to(members), variance.sqrt().to(members)


def moments(members: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N,) and variance (N,) of (M, N), by M, added up in the members' order."""
    mean = sum(members[1:], members[0]) / len(members)
    squares = [(each - mean).square() for each in members]
    return mean, sum(squares[1:], squares[0]) / len(members)


def _member(given: Any) -> _Member:
    rm, adapter = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(rm, Scorer):
        raise TypeError(f'Expected members to be RewardModels, or (RewardModel, "adapter"), got {shown(given)}')
    known = getattr(rm.model, "peft_config", None) or {}
    if adapter is not None and adapter not in known:
        names = f"has {', '.join(known)}" if known else "has none"
        raise ValueError(f"Expected members with an adapter of their model, which {names}, got {shown(adapter)}")
    return _Member(rm, adapter)


def _expect_own_heads(members: list[_Member]) -> None:
    """ValueError where one head would be put on several adapters: a head that lies beside an adapter is its alone."""
    heads: dict[int, str] = {}
    for member in members:
        program = member.rm.binding.program
        if member.adapter is None or program is None or isinstance(program, TokenRows):
            continue
        if heads.setdefault(id(program), member.adapter) != member.adapter:
            raise ValueError(
                f"Expected a head for each adapter, got the same {program.kind} for {heads[id(program)]} and "
                f"{member.adapter}: give (rmfast.RewardModel(model, tokenizer, head=...), {member.adapter!r})"
            )


def _encoding_key(rm: Scorer) -> Any:
    """Equal for models that make the same ids of all inputs."""
    tokenizer, program = rm.tokenizer, rm.binding.program
    limits = rm.max_length, rm.table, rm.binding.vocab_size, rm.binding.causal, getattr(program, "append", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or backend is None:
        return limits, None if tokenizer is None else id(tokenizer)
    digest = hashlib.sha256(backend.to_str().encode())
    digest.update(repr((tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__)).encode())
    return limits, digest.hexdigest()


def _same_body(one: _Member, other: _Member) -> bool:
    """Whether two members' bodies give the same hidden states, to the bit."""
    a, b = one.rm.binding, other.rm.binding
    alike = not a.clamps and not b.clamps and a.in_fp32 == b.in_fp32 and one.rm.invariant == other.rm.invariant
    if not alike or not (_shares(a) and _shares(b)) or one.adapter != other.adapter:
        return False
    if a.root is b.root or a.body is b.body:
        return True
    if (
        one.adapter is not None
        or type(a.body) is not type(b.body)
        or a.device != b.device
        or _settings(a) != _settings(b)
    ):
        return False
    bodies = (a.body, b.body)
    if not all(is_plain(m) and is_readable(m) and not has_hooks(m) for body in bodies for m in body.modules()):
        return False
    return fingerprint(a.body) == fingerprint(b.body) and _equal(a.body, b.body)


def _shares(binding: Binding) -> bool:
    """Whether its rewards are made of rows of one run of the body, each for itself."""
    return binding.reads_rows and not (binding.program is not None and (binding.program.gated or binding.program.pools))


def _settings(binding: Binding) -> dict[str, Any]:
    found = {name: value for name, value in binding.config.to_dict().items() if name not in _OF_HEADS}
    return found | {"attention": getattr(binding.config, "_attn_implementation", None)}


def _equal(a: nn.Module, b: nn.Module) -> bool:
    one, two = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (a, b))
    if one.keys() != two.keys() or [type(m) for m in a.modules()] != [type(m) for m in b.modules()]:
        return False
    return all(x.dtype == two[name].dtype and torch.equal(x, two[name]) for name, x in one.items())


def _versions(body: nn.Module) -> list[tuple[int, int]]:
    """Where weights are, and how often they were written to."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in body.parameters() if not p.is_meta]


def _flat(read: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(read) if read else np.zeros(0, np.int64)


def _run(
    models: list[Scorer], items: list[Encoded], read: list[np.ndarray], running: tuple[Any, Any, Any]
) -> Iterator[Tensor]:
    """Rewards (N, K) of each model, of one run of the first one's body."""
    first, counts = models[0], [rm.num_labels for rm in models]
    head: Callable[..., Tensor] | None = None
    if len(models) > 1:

        def head(hidden: Tensor, rows: Tensor) -> Tensor:
            made = []
            for rm in models:
                with ExitStack() as stack:
                    if rm.binding.root is not first.binding.root:
                        stack.enter_context(rm.binding.session())
                    made.append(rm.binding.rewards(hidden, rows))
            dtype = torch.promote_types(made[0].dtype, made[-1].dtype)
            return torch.cat([each.to(dtype) for each in made], 1)

    roots = list(dict.fromkeys(rm.binding.root for rm in models))
    with lock_of(nn.ModuleList(roots)) if head else ExitStack():  # all at once, in the order in which locks are taken
        values = first.run(items, read, *running, head)
    rewards = torch.cat(values) if values else torch.empty(0, sum(counts))
    return (rm.corrected(each, items) for rm, each in zip(models, rewards.split(counts, 1)))


@contextmanager
def _adapter(member: _Member) -> Iterator[None]:
    """Switches a model to a member's adapter, and back at the end."""
    if member.adapter is None:
        yield
        return
    model: Any = member.rm.model
    with lock_of(member.rm.binding.root):
        before, grad = model.active_adapter, {p: p.requires_grad for p in model.parameters()}
        try:
            model.set_adapter(member.adapter)
            yield
        finally:
            model.set_adapter(before)
            for p, required in grad.items():
                p.requires_grad_(required)
