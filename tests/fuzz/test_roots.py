"""Paths of visitors: what is allowed lies inside, links followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import strategies as st

from lora_trainer.hosts.roots import PATH_KEYS, Roots
from tests.fuzz.harness import fuzz, works_or_refuses
from tests.fuzz.inputs import TEXT, VALUES
from tests.fuzz.watch import ARENA

PARTS = [
    "..",
    ".",
    "...",
    ". .",
    "a",
    "cats",
    "out",
    "chain",
    "loop",
    "pipe",
    "nul",
    "a.",
    "x:y",
    "%2e%2e",
    "%252e%252e",
]
PARTS += [
    "．．",
    "‥",
    "…",
    "%c0%ae%c0%ae",
    "/",
    "\\",
    "／",
    "＼",
    "∕",
    "%2f",
    "%5c",
    "//",
    "C:",
    "\\\\?\\",
    "\0",
    "~",
    " ",
]
PARTS += [str(ARENA.inside), str(ARENA.outside), "proc/self/cwd", "dev/zero", "outside", "etc", "secret.txt", "~", " "]
PATHS = st.lists(st.sampled_from(PARTS) | TEXT, max_size=8).flatmap(
    lambda parts: st.sampled_from(["/", "", "\\", f"/{os.sep}"]).map(lambda between: between.join(parts))
)
BELOW = PATHS.map(lambda path: f"{ARENA.inside}/{path}") | PATHS


@pytest.fixture(scope="module", autouse=True)
def links():
    (ARENA.inside / "cats").mkdir(exist_ok=True)
    targets = {"out": ARENA.outside, "chain": ARENA.inside / "out" / "pictures", "loop": ARENA.inside / "loop"}
    for name, target in targets.items():
        (ARENA.inside / name).symlink_to(target)
    os.mkfifo(ARENA.inside / "pipe")
    yield
    for name in ("out", "chain", "loop", "pipe"):
        (ARENA.inside / name).unlink()


@fuzz("roots", 200, text=BELOW | VALUES)
def test_what_is_allowed_is_inside(text):
    with works_or_refuses():
        path = Roots([ARENA.inside], True).check("train_data_dir", text)
        assert path.is_absolute()
        assert Path(os.path.realpath(path)) == path
        assert path.is_relative_to(ARENA.inside)
        assert not path.exists() or path.is_file() or path.is_dir()


@fuzz("roots", 60, text=BELOW | VALUES)
def test_a_local_webui_opens_no_device(text):
    with works_or_refuses():
        path = Roots([], False).check("train_data_dir", text)
        assert path.is_absolute()
        assert not path.exists() or path.is_file() or path.is_dir()


@fuzz("roots", 60, settings=st.dictionaries(st.sampled_from(PATH_KEYS) | TEXT, BELOW | VALUES, max_size=5))
def test_settings_of_visitors(settings):
    with works_or_refuses():
        checked = Roots([ARENA.inside], True).settings(settings)
        paths = [Path(checked[key]) for key in PATH_KEYS if checked.get(key) is not None]
        assert all(path.is_relative_to(ARENA.inside) for path in paths)
