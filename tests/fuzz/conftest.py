"""Prints how many cases ran for each target."""

from __future__ import annotations

import os

from tests.fuzz.harness import COUNTS, REFUSED, WORKED

# Pipes, links and timers of POSIX.
collect_ignore_glob = ["test_*.py"] if os.name == "nt" else []


def pytest_terminal_summary(terminalreporter) -> None:
    if COUNTS:
        terminalreporter.section("fuzzed cases")
        for target, count in sorted(COUNTS.items()):
            parts = f"  ({WORKED[target]:,} calls worked, {REFUSED[target]:,} refused)" if WORKED[target] else ""
            terminalreporter.write_line(f"{target:<14}{count:>9,}{parts}")
        terminalreporter.write_line(f"{'all':<14}{sum(COUNTS.values()):>9,}")
