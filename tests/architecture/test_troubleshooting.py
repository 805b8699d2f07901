"""docs/troubleshooting.md holds every error of the source."""

from __future__ import annotations

from tools.troubleshooting import TARGET, collect, document


def test_the_page_is_up_to_date():
    assert TARGET.read_text(encoding="utf-8") == document(), "run: python -m tools.troubleshooting"


def test_errors_of_every_kind_are_found():
    found = {(raised.kind, raised.file) for raised in collect()}
    assert {
        ("ConfigError", "config/rules.py"),
        ("DataError", "dataset/images.py"),
        ("DivergedError", "training/results.py"),
        ("OutOfMemoryError", "training/planning.py"),
        ("OutputError", "files.py"),
        ("ResumeError", "training/resume.py"),
    } <= found
