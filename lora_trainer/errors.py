"""The errors a user can mend. Anything else that is raised is a defect of ours."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Bad input: the message is one readable line that names the file or key, what was expected and what
    was found. The command line prints it without a traceback and exits with 2."""


class ConfigError(UserError):
    """Every problem of a configuration, reported together, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """A data set that cannot be trained on."""


class ModelError(UserError):
    """A checkpoint or LoRA file that cannot be used."""


class OutputError(UserError):
    """A result that could not be written; nothing half-written is left under its final name."""
