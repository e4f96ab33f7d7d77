"""Windows of a small run, as an output is given them, in a file or in a store."""

from __future__ import annotations

RUN = {"run": 1}
WINDOWS: list[tuple[list[bytes], list[int]]] = [  # lines, and which rows are left out
    ([b'{"id": 0}\n', b'{"id": 2}\n'], [1]),
    ([], [3, 4]),
    ([b'{"id": 5}\n', b'{"id": 6}\n'], []),
    ([b'{"id": 7}\n'], [8]),
]
