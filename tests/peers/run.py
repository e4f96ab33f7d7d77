"""A peer's own tests in its source folder, which is where this is called, but for those that NAME.ini leaves out.

    python tests/peers/run.py NAME VERSION [pytest's options]

The plugin NAME_on.py switches the integration on. An entry of NAME.ini that leaves out nothing is an error, so that
none outlives its reason; pytest's summary ends with all of them.
"""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def left_out(peer: str, version: str) -> dict[str, str]:
    """Name -> reason: a file in tests/, a pattern of such files, or a test as file::test."""
    entries = configparser.ConfigParser(delimiters="=")
    entries.optionxform = str  # type: ignore[assignment, method-assign]  # names keep their case
    entries.read_string((HERE / f"{peer}.ini").read_text())
    return {**entries["every version"], **entries[version]}


class LeaveOut:
    """Takes the tests out, and tells why."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        names = tuple(f"tests/{name}" for name in self.reasons if "::" in name)
        out = [item for item in items if item.nodeid.startswith(names)]
        for name in names:
            if not any(item.nodeid.startswith(name) for item in out):
                raise pytest.UsageError(f"{name} is left out and does not exist")
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, reason in self.reasons.items():
            terminalreporter.write_line(f"left out: {name}: {reason}")


def main(peer: str, version: str, *options: str) -> int:
    reasons = left_out(peer, version)
    files = set(Path("tests").glob("test_*.py"))
    for name in reasons:
        if "::" not in name:
            out = set(Path("tests").glob(name))
            if not out:
                sys.exit(f"tests/{name} is left out and does not exist")
            files -= out
    sys.path.insert(0, str(Path.cwd()))  # as `python -m pytest` has it
    plugins = ["-p", f"{peer}_on", "-p", "no:cacheprovider", "-W", "ignore"]
    return pytest.main(["-q", *plugins, *options, *sorted(map(str, files))], [LeaveOut(reasons)])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
