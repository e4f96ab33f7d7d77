"""What a kernel's machine code says of it: its instructions, its innermost loops, how wide it loads, its products."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"^\s*(\.L\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"^BRA\b.*`\((\.L\w+)\)")
_SHORT = 24  # instructions of a loop that only waits, or finds a row


@dataclass(frozen=True)
class Sass:
    """The text of `nvdisasm --print-code` of one kernel."""

    text: str

    @cached_property
    def _placed(self) -> tuple[list[str], dict[str, int]]:
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for label, instruction in _LINE.findall(self.text):
            if label:
                labels[label] = len(instructions)
            elif instruction != "NOP":
                instructions.append(instruction)
        return instructions, labels

    @property
    def instructions(self) -> list[str]:
        return self._placed[0]

    @cached_property
    def loops(self) -> list[list[str]]:
        """The instructions of each loop that holds no other, in order; short ones are left out."""
        instructions, labels = self._placed
        spans = set()
        for end, instruction in enumerate(instructions):
            to = _BRANCH.match(instruction)
            if to and labels.get(to[1], end) < end:
                spans.add((labels[to[1]], end + 1))
        inner = [
            (a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b and d - c > 4 for c, d in spans)
        ]
        return [instructions[a:b] for a, b in sorted(inner) if b - a >= _SHORT]

    def loads(self) -> Counter[int]:
        """How many loads from global memory are how many bits wide; those into shared memory count as well."""
        return _widths(self.instructions, ("LDG", "LDGSTS"))

    def stores(self) -> Counter[int]:
        return _widths(self.instructions, ("STG",))

    def count(self, name: str) -> int:
        """Instructions whose name, before its first dot, is this."""
        return sum(re.split(r"[.\s]", instruction, maxsplit=1)[0] == name for instruction in self.instructions)

    def spills(self) -> int:
        return self.count("LDL") + self.count("STL")

    def wgmma_columns(self) -> set[int]:
        """N of Hopper's matrix products, 64 x N."""
        return {int(n) for n in re.findall(r"\bHGMMA\.64x(\d+)x", self.text)}


def _widths(instructions: list[str], names: tuple[str, ...]) -> Counter[int]:
    found: Counter[int] = Counter()
    for instruction in instructions:
        name, *options = instruction.split(None, 1)[0].split(".")
        if name in names:
            wide = [int(option.lstrip("US")) for option in options if re.fullmatch(r"[US]?(8|16|64|128|256)", option)]
            found[wide[-1] if wide else 32] += 1
    return found


_LAYOUT = re.compile(r"^(#\w+) = #ttg\.nvidia_mma<\{(.*?)\}>", re.MULTILINE)
_PRODUCT = re.compile(r"(?:tt\.dot|ttng\.warp_group_dot) .*-> tensor<(\d+)x(\d+)x\w+, (#\w+)>")


def repeated_warps(ttgir: str) -> list[str]:
    """The matrix products of which several warps compute the same part: their tile and how warps lie over it."""
    layouts = {}
    for name, fields in _LAYOUT.findall(ttgir):
        warps, shape = (
            [int(x) for x in re.search(rf"{field} = \[(.*?)\]", fields)[1].split(",")]
            for field in ("warpsPerCTA", "instrShape")
        )
        layouts[name] = [count * size for count, size in zip(warps, shape)], warps
    found = []
    for rows, columns, layout in _PRODUCT.findall(ttgir):
        if layout in layouts:
            (high, wide), warps = layouts[layout]
            if high > int(rows) or (wide > int(columns) and warps[1] > 1):
                found.append(f"{rows}x{columns} by warps {warps}")
    return found
