"""The sections of an audit, one after the other, from scores that are there and a model that makes the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rmfast import arguments
from rmfast.audit import biases, measures, shown
from rmfast.audit.data import Agreement, Audit, Biases, Pair, finite
from rmfast.audit.facts import facts_of
from rmfast.audit.kept import Kept
from rmfast.evaluation.pairs import Pairs
from rmfast.evaluation.parity import parity
from rmfast.evaluation.result import Evaluation
from rmfast.resampling import clusters

if TYPE_CHECKING:
    from rmfast.reward_model import RewardModel

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How much is looked at.

    Attributes:
        show: pairs of each kind that are shown: right and wrong ones that are most certain, and the least certain.
        sweep_pairs: so many of the shown pairs are patched, the wrong ones first.
        debias: fit a clamp and report with it.
        trials: of the search for the clamp.
        parity: texts that are also scored in other ways; 0 for none.
        seed: of all that is drawn.
        batch_tokens: most tokens that run at once.
    """

    show: int = 5
    sweep_pairs: int = 2
    debias: bool = True
    trials: int = 20
    parity: int = 16
    seed: int = 0
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("parity", 0), ("seed", 0)):
            arguments.whole(name, getattr(self, name), least)
        for name, least in (("show", 1), ("sweep_pairs", 0)):
            arguments.whole(name, getattr(self, name), least, 10)  # more would not fit into the page
        arguments.flag("debias", self.debias)


def collect(
    rm: RewardModel | Callable[[], RewardModel],
    found: Evaluation,
    *,
    model: str = "",
    settings: Settings | None = None,
    kept: Kept | None = None,
    facts: dict[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
    **encoding: Any,
) -> Audit:
    """All that the page of an audit shows.

    Args:
        rm: the model whose scores these are, or a function that gives it, called where a section must be made.
        found: its scores of pairs (`rmfast.evaluation.evaluate(rm, pairs, layout="pairs")`).
        model: what it is called.
        settings: how much is looked at.
        kept: where sections are kept, and found again.
        facts: more facts by name, such as the command.
        say: told of each section that is made.
        encoding: max_length, truncation, format, chat_template_kwargs, tools, as for the scores.

    Returns:
        An `Audit`. A section that this model or these pairs don't allow is missing, and says why.

    Raises:
        ValueError: the scores are of another layout than pairs, or of a single pair.
    """
    arguments.instance("found", found, Evaluation)
    if not isinstance(found.layout, Pairs):
        raise ValueError(f"Expected scores of pairs, got those of the layout {found.layout.name}")
    if len(found.items) < 2:
        raise ValueError(f"Expected at least 2 pairs with scores, got {len(found.items)}")
    return _Audited(rm, found, settings or Settings(), kept or Kept(), say, encoding).audit(model, facts or {})


class _Audited:
    """One audit in the making."""

    def __init__(
        self, rm: Any, found: Evaluation, settings: Settings, kept: Kept, say: Callable[[str], None], encoding: Any
    ) -> None:
        self.rm: Callable[[], RewardModel] = cache(rm) if callable(rm) else lambda: rm
        self.found, self.settings, self.kept, self.say, self.encoding = found, settings, kept, say, encoding
        self.running = {"batch_tokens": settings.batch_tokens}
        self.missing: dict[str, str] = {}

    def audit(self, model: str, more: dict[str, str]) -> Audit:
        found, s = self.found, self.settings
        characters = np.array([[len(p.chosen), len(p.rejected)] for p in biases.pairs_of(found.items)])
        facts = self.section("facts", {}, lambda: facts_of(self.rm()))
        made = self.kept.section("made", {}, lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
        pairs = self.pairs()
        of_biases, agreement = self.biases(), self.parity()
        return Audit(
            model=model,
            pairs=len(found.items),
            prompts=int(clusters([item.prompt for item in found.items]).max()) + 1,
            left_out=found.left_out,
            confidence=found.confidence,
            figures=measures.figures(found),
            calibration=measures.calibration(found),
            lengths=measures.lengths(found, characters, s.seed),
            biases=of_biases,
            shown=pairs,
            parity=agreement,
            facts={"run": [*map(list, more.items()), ["made", made], ["seed", str(s.seed)]], **facts},
            missing=self.missing,
        )

    def section(self, name: str, settings: Any, make: Callable[[], T]) -> T:
        def said() -> T:
            self.say(name)
            return make()

        return self.kept.section(name, settings, said)

    def tried(self, name: str, settings: Any, make: Callable[[], T]) -> T | None:
        """A section, or None where the model or the pairs don't allow it: `missing` says why."""

        def tried() -> Any:
            self.rm()  # what loading it raises is no section's
            try:
                return {"made": make()}
            except (ValueError, ImportError) as error:
                return {"why": " ".join(str(error).split())}

        got = self.section(name, settings, tried)
        if "why" in got:
            self.missing[name] = got["why"]
        return got.get("made")

    def pairs(self) -> list[Pair]:
        s = self.settings
        pairs = shown.chosen_pairs(self.found, s.show)
        inputs = shown.inputs_of(self.found, pairs)
        with_ = (self.running, self.encoding)
        tokens = self.tried("tokens", s.show, lambda: shown.trajectories(self.rm(), inputs, *with_))
        lens = self.tried("lens", s.show, lambda: shown.lenses(self.rm(), inputs, *with_))
        for i, pair in enumerate(pairs):
            pair["tokens"] = tokens[i] if tokens else None
            pair["lens"] = lens[i] if lens else None
        if s.sweep_pairs:
            self.sweeps(pairs, inputs)
        return pairs

    def sweeps(self, pairs: list[Pair], inputs: list[Any]) -> None:
        """Sweeps of the first pairs that can be swept, wrong and right ones in turn."""
        can = self.tried("swept", self.settings.show, lambda: shown.can_be_swept(self.rm(), inputs, self.encoding))
        sure = [[i for i, pair in enumerate(pairs) if pair["kind"] == kind] for kind in ("wrong", "right")]
        order = [i for both in zip_longest(*sure) for i in both if i is not None]
        order += [i for i in range(len(pairs)) if i not in order]
        some = [i for i in order if can and can[i]][: self.settings.sweep_pairs]
        if can and not some:
            self.missing["sweep"] = "all texts that are shown are too long to be swept, or the same"
        for i in some:
            name = f"sweep-{pairs[i]['place']}"
            two = inputs[2 * i : 2 * i + 2]
            make = lambda two=two: shown.sweep(self.rm(), two, inputs, self.running, self.encoding)  # noqa: E731
            pairs[i]["sweep"] = self.tried(name, self.settings.show, make)
            if name in self.missing:
                self.missing["sweep"] = self.missing.pop(name)

    def biases(self) -> Biases:
        s = self.settings
        if not s.debias:
            return biases.without_clamp(self.found, "it was not asked for")
        options = {"trials": s.trials, "seed": s.seed}
        bootstrap = [self.found.resamples, self.found.confidence, self.found.seed]
        fit = lambda: biases.with_clamp(  # noqa: E731
            self.rm(), self.found, **options, running=self.running, encoding=self.encoding
        )
        return self.tried("biases", [options, bootstrap], fit) or biases.without_clamp(
            self.found, self.missing.pop("biases")
        )

    def parity(self) -> Agreement | None:
        s = self.settings
        if not s.parity:
            return None

        def compared() -> Agreement:
            texts = [text for item in self.found.items for text in item.inputs]
            scores = np.concatenate(list(self.found.scores))
            some = np.sort(np.random.default_rng(s.seed).permutation(len(texts))[: s.parity])
            rows = parity(self.rm(), [texts[i] for i in some], scores=scores[some], **self.running, **self.encoding)
            ways = [
                {"way": row.way, "largest": finite(row.largest), "moved": row.moved, "n": row.n, "why": row.why}
                for row in rows.rows
            ]
            return {"ways": ways, "spread": rows.spread}  # type: ignore[typeddict-item]

        return self.tried("parity", {"parity": s.parity, "seed": s.seed}, compared)
