"""Another trainer's file to settings that build."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lora_trainer.config import build
from lora_trainer.config.export import dump
from lora_trainer.config.options import options
from lora_trainer.errors import ConfigError, printable, shown
from lora_trainer.imports import kohya_dataset, lora_scripts, onetrainer
from lora_trainer.imports.taken import OFF, Taken

# Of more than this, reading TOML takes many seconds; nobody writes so much by hand.
MAX_FILE_BYTES = 256 * 1024
_VALUE = 200
# The parser remembers each beginning of a dotted key: 64 GB of them for one key of 256 KiB.
_MANY_PARTS = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')[ \t]*\.[ \t]*){32}""")


class Format(Protocol):
    """A module that knows one kind of file, already parsed. Both are pure functions of what they are given."""

    NAME: str

    def recognises(self, data: object) -> bool: ...

    def read(self, data: Any) -> Taken: ...


FORMATS: tuple[Format, ...] = (kohya_dataset, onetrainer, lora_scripts)  # type: ignore[assignment]


def read_file(path: Path) -> tuple[str, Taken]:
    """(the format's name, what was taken) of a .toml or .json file. Raises ConfigError."""
    data = _parsed(path, _text(path))
    found = next((known for known in FORMATS if known.recognises(data)), None)
    if found is None:
        names = ", ".join(known.NAME for known in FORMATS)
        raise ConfigError([f"{path}: expected one of: {names}; found {_outline(data)}"])
    taken = found.read(data)
    _settle(taken)
    if not taken.settings:
        raise ConfigError([f"{path}: expected settings that have a counterpart here, found none"])
    if "learning_rate" in taken.settings:
        # A whole run, which no other trainer saves the average of, or gives its matrices two rates unasked.
        taken.settings.setdefault("ema_decay", 0.0)
        taken.settings.setdefault("loraplus_lr_ratio", 1.0)
    return found.NAME, taken


def to_yaml(path: Path, name: str, taken: Taken) -> str:
    """The settings, with all that did not become one in comments above them."""
    settings = taken.plain()
    text = dump({key: settings[key] for key in options() if key in settings})
    head = [f"Made from {printable(path.name)}, {name}.", *(f"needed: {line}" for line in missing(taken)), *told(taken)]
    return "".join(f"# {line}\n" for line in head) + "\n" + text


def missing(taken: Taken) -> list[str]:
    """What a run needs and the file does not say."""
    needed = [option for option in options().values() if option.required and option.key not in taken.settings]
    return [f"{option.key}, here or on the command line: {option.help}" for option in needed]


def told(taken: Taken) -> list[str]:
    """The remarks, then what was left, under each reason once; what was off anyway comes last. Safe to print."""
    reasons: dict[str, dict[str, None]] = {}
    for left in sorted(taken.left, key=lambda left: left.why == OFF):
        entry = f"{printable(left.key, _VALUE)} = {printable(shown(left.value), _VALUE)}"
        reasons.setdefault(left.why, {})[entry] = None
    lines = [f"not taken over: {part} ({why})" for why, entries in reasons.items() for part in _parts(list(entries))]
    return [printable(line) for line in (*taken.remarks, *lines)]


def _parts(entries: Sequence[str], most: int = 4) -> Iterator[str]:
    """A few on a line, so that none has to be cut."""
    for start in range(0, len(entries), most):
        yield ", ".join(entries[start : start + most])


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError([f"{path}: expected at most {MAX_FILE_BYTES // 1024} KiB, found more"])
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{path}: expected UTF-8 text, found byte {data[error.start]:#04x} at {error.start}"]
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None


def _parsed(path: Path, text: str) -> object:
    if path.suffix.lower() not in (".toml", ".json"):
        raise ConfigError([f"{path}: expected a .toml or .json file, found {path.suffix or 'no ending'}"])
    try:
        return json.loads(text) if path.suffix.lower() == ".json" else _toml(path, text)
    except RecursionError:
        raise ConfigError([f"{path}: not valid: nested too deeply"]) from None
    except ValueError as error:  # both parsers' errors are ValueErrors
        raise ConfigError([f"{path}: not valid: {error}"]) from None


def _toml(path: Path, text: str) -> object:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib
        except ModuleNotFoundError:
            raise ConfigError([f"{path}: TOML on Python 3.10 needs the package tomli: pip install tomli"]) from None
    if found := _MANY_PARTS.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ConfigError([f"{path}, line {line}: expected keys of at most 32 parts, found a longer one"])
    return tomllib.loads(text)


def _settle(taken: Taken) -> None:
    """Leave out what the rules between settings refuse."""
    needed = {option.key: "x" for option in options().values() if option.required}
    for _ in range(len(taken.settings)):
        problem = next(_problems(needed, taken), None)
        if problem is None:
            return
        key = re.split("[:,]", problem)[0]
        if key not in taken.settings:
            raise ConfigError([problem])
        taken.leave(key, taken.plain()[key], problem)
        del taken.settings[key]


def _problems(needed: dict[str, str], taken: Taken) -> Iterator[str]:
    try:
        build(needed, taken.settings)
    except ConfigError as error:
        yield from error.problems


def _outline(data: object) -> str:
    if isinstance(data, dict):
        return f"the keys {', '.join(map(str, list(data)[:8]))}" if data else "nothing"
    return f"a {type(data).__name__}"
