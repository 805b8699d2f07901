"""The HTTP API: a thin skin over config and jobs, mounted on a WebUI's FastAPI app."""

from __future__ import annotations

from lora_trainer.api.editor import mount_editor
from lora_trainer.api.ports import ApiHost, EditorHost
from lora_trainer.api.routes import mount

__all__ = ["ApiHost", "EditorHost", "mount", "mount_editor"]
