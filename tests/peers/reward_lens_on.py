"""The pytest plugin of run.py: reward-lens' own tests with the integration on (`make test-reward-lens`)."""

from __future__ import annotations

import pytest

import rmfast.integrations.reward_lens as integration


def pytest_collection_finish(session: pytest.Session) -> None:
    integration.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "× rmfast" not in integration.explain() and session.testscollected:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(integration.explain())
