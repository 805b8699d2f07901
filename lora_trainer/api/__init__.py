"""The HTTP API: a thin skin over config and jobs, mounted on a WebUI's FastAPI app."""

from __future__ import annotations

from lora_trainer.api.ports import ApiHost
from lora_trainer.api.routes import mount

__all__ = ["ApiHost", "mount"]
