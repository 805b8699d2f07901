"""Prints how many cases ran for each target."""

from __future__ import annotations

from tests.fuzz.harness import COUNTS


def pytest_terminal_summary(terminalreporter) -> None:
    if COUNTS:
        terminalreporter.section("fuzzed cases")
        for target, count in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{target:<14}{count:>9,}")
        terminalreporter.write_line(f"{'all':<14}{sum(COUNTS.values()):>9,}")
