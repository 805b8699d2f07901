"""What the API needs from its host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lora_trainer.editing.editor import Editor
    from lora_trainer.editing.thumbnails import Thumbnails
    from lora_trainer.jobs.service import JobService
    from lora_trainer.jobs.view import JobView


class ApiHost(Protocol):
    @property
    def jobs(self) -> JobService: ...

    @property
    def credentials(self) -> Mapping[str, str] | None:
        """Password by user, from --api-auth; None when it was not given."""
        ...

    @property
    def non_local(self) -> bool:
        """Whether other computers can reach the WebUI."""
        ...

    def submit(self, settings: Mapping[str, object]) -> JobView:
        """Complete `settings` with what the host knows, check them and queue the job. Raises UserError."""
        ...

    def find_rate(self, settings: Mapping[str, object]) -> JobView:
        """The same with a search for a learning rate. Raises UserError."""
        ...


class EditorHost(Protocol):
    """What the caption editor needs."""

    @property
    def editor(self) -> Editor: ...

    @property
    def thumbnails(self) -> Thumbnails: ...

    @property
    def editor_pass(self) -> str:
        """What the tab's page knows and others cannot guess."""
        ...

    def allowed(self, settings: Mapping[str, object]) -> dict[str, object]:
        """`settings` with each path in it checked and resolved. Raises UserError."""
        ...
