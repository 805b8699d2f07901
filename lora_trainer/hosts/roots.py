"""Which paths a visitor of the WebUI may name."""

from __future__ import annotations

import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

import msgspec

from lora_trainer.config.convert import Problem, convert
from lora_trainer.config.options import options
from lora_trainer.config.schema import PATHS, TRUSTED
from lora_trainer.errors import ConfigError, shown

# A checkpoint is chosen by its name.
PATH_KEYS = tuple(key for key in PATHS if key != "base_model")
# Windows opens a device under these names in any folder and with any ending: nul, COM1.txt.
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])[ .]*(\..*)?", re.IGNORECASE)

# As long as Linux allows; resolving a much longer one takes minutes.
MAX_PATH = 4096
_DECODINGS = 4

_NO_DEVICE = "a file or a folder, no device"
_OPENS = "a path that can be opened"


class Roots:
    """The folders that settings may name paths in. `enforced` is for a WebUI that others can reach; on one that only
    its owner can reach any path goes that is neither a device nor malformed."""

    def __init__(self, roots: Sequence[Path], enforced: bool) -> None:
        self._roots = tuple(roots)
        self._enforced = enforced

    def check(self, key: str, text: object) -> Path:
        """The path that `text` means, links followed. Raises ConfigError, which names the rule and the roots."""
        if not isinstance(text, str) or not text.strip():
            raise ConfigError([f"{key}: expected a path, found {shown(text)}"])
        problem = next(_malformed(text), None) or (next(_foreign_readings(text), None) if self._enforced else None)
        path = None if problem else _resolved(text)
        if path is None:
            raise self._refused(key, text, problem or _OPENS)
        # Looking at a path outside the roots would tell a visitor what exists there, so their rule comes first.
        if self._enforced:
            below = self._below(path)
            if below is None:
                raise self._refused(key, text, "a path that stays inside the allowed folders, links followed")
            if any(":" in part or _DEVICE_NAME.fullmatch(part) for part in below.parts):
                raise self._refused(key, text, "names without : and none that Windows keeps for devices")
            if any(part != part.rstrip(" .") for part in below.parts):
                raise self._refused(key, text, "names that end in no dot or space, which Windows drops")
        if problem := _unusable(path):
            raise self._refused(key, text, problem)
        return path

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`settings` with each path in it checked and resolved, if they name no code. Raises ConfigError with every
        problem at once."""
        checked = dict(settings)
        problems = [f"{key}: only the command line may name code" for key in TRUSTED if settings.get(key) is not None]
        for key in PATH_KEYS:
            if settings.get(key) is None or (key == "train_data_dir" and _draws_its_own(settings)):
                continue
            try:
                checked[key] = str(self.check(key, settings[key]))
            except ConfigError as error:
                problems += error.problems
        try:
            if settings.get("concepts") is not None:
                checked["concepts"] = self._concepts(settings["concepts"], checked.get("train_data_dir"))
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)
        return checked

    def _concepts(self, given: object, home: object) -> list[dict[str, Any]]:
        """The entries of `given`, as it was sent; folders are relative to `home`. Raises ConfigError."""
        try:
            concepts = convert(options()["concepts"], given)
        except Problem as problem:
            raise ConfigError([str(problem)]) from None
        folders = ((number, concept.folder) for number, concept in enumerate(concepts, start=1))
        others = ((number, concept.regularization) for number, concept in enumerate(concepts, start=1))
        for number, folder in (*folders, *((number, text) for number, text in others if text is not None)):
            key = f"concepts, entry {number}"
            # By itself first: as the end of a longer path it could mean something else.
            problem = next(_malformed(folder), None)
            problem = problem or (next(_foreign_readings(folder), None) if self._enforced else None)
            if problem:
                raise self._refused(key, folder, problem)
            self.check(key, str(Path(home if isinstance(home, str) else ".") / folder))
        return msgspec.to_builtins(concepts)

    def _below(self, path: Path) -> Path | None:
        """`path` relative to the root it is in. A root may itself be a link, and may appear after the start."""
        homes = (_resolved(str(root)) for root in self._roots)
        return next((path.relative_to(home) for home in homes if home and path.is_relative_to(home)), None)

    def _refused(self, key: str, text: str, rule: str) -> ConfigError:
        where = ""
        if self._enforced:
            folders = ", ".join(str(root) for root in self._roots) or "none"
            where = f" (this WebUI can be reached from elsewhere; allowed folders: {folders})"
        return ConfigError([f"{key}: expected {rule}{where}, found {shown(text)}"])


def _draws_its_own(settings: Mapping[str, Any]) -> bool:
    """Whether a slider is asked for that is given no pictures."""
    return settings.get("mode") == "slider" and settings.get("train_data_dir") == ""


def _malformed(text: str) -> Iterator[str]:
    """What no system opens, or opens as a device."""
    if len(text) > MAX_PATH:
        yield f"a path of at most {MAX_PATH:,} characters"
    if "\0" in text:
        yield "a path without NUL bytes"
    try:
        text.encode()
    except UnicodeEncodeError:
        yield "a path in valid Unicode"
    if text.replace("/", "\\").startswith("\\\\.\\"):
        yield _NO_DEVICE


def _foreign_readings(text: str) -> Iterator[str]:
    """What is wrong with the path, or with what a program that decodes it would read: %2e%2e, ．．／, %252e%252e."""
    yield from _foreign(text)
    readings = [text]
    for _ in range(_DECODINGS):
        reading = unicodedata.normalize("NFKC", unquote(readings[-1]))
        if reading == readings[-1]:
            return
        readings.append(reading)
        # Bytes that are no UTF-8, such as the overlong %c0%ae for a dot, become replacement characters.
        if "\ufffd" in reading and "\ufffd" not in text:
            yield "a path in valid Unicode"
        yield from _malformed(reading)
        yield from _foreign(reading)
        if reading[:1] in ("/", "\\") and text[:1] not in ("/", "\\"):
            yield "a path without encoded slashes"
    yield "a path that is not encoded over and over"


def _foreign(text: str) -> Iterator[str]:
    """Forms that lead out of a folder, judged alike on every system and before anything is opened: merely looking at
    a network path makes Windows send the user's login to it."""
    if text.replace("/", "\\").startswith("\\\\"):
        yield "no network or \\\\?\\ path"
    windows = PureWindowsPath(text)
    # Windows drops spaces and dots at a name's end, and so may see .. in what has some more of them.
    if any(not part.strip(" .") for part in windows.parts):
        yield "a path without .."
    # Also C:name without a backslash, which is relative to whatever folder is current on that drive.
    if windows.drive and (not windows.root or Path(text).drive != windows.drive):
        yield "no drive of Windows"


def _resolved(text: str) -> Path | None:
    try:
        return Path(text).resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links is a RuntimeError up to Python 3.12
        return None


def _unusable(path: Path) -> str | None:
    """The rule that what is at `path` breaks, if it is there."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return _OPENS
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else _NO_DEVICE
