"""The errors a user can mend. Anything else that is raised is a defect of ours."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence

MAX_LINE, MAX_LINES = 2000, 100
# What moves a terminal's cursor, breaks a line, turns the direction of writing, or is no character.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Bad input: the message is one readable line that names the file or key, what was expected and what
    was found. The command line prints it without a traceback and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(UserError):
    """Every problem of a configuration, reported together, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = len(problems) - MAX_LINES
        self.problems = (*map(printable, problems[:MAX_LINES]), *([f"… and {more:,} more"] if more > 0 else []))
        Exception.__init__(self, "\n".join(self.problems))


class DataError(UserError):
    """A data set that cannot be trained on."""


class ModelError(UserError):
    """A checkpoint or LoRA file that cannot be used."""


class OutputError(UserError):
    """A result that could not be written; nothing half-written is left under its final name."""


def printable(text: str, most: int = MAX_LINE) -> str:
    """`text` as one line of at most about `most` characters that is safe to print: its middle is left out, and what
    is no visible character is written as an escape."""
    text = _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 3 :]}"


def shown(value: object) -> str:
    """A value from outside for a message: its repr, however large or deep it is."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = 300

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write very long numbers.
        return repr(value) if value.bit_length() < 1000 else f"a whole number of {value.bit_length():,} bits"


_SHORT = _Short()
