"""What the tab needs from its host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lora_trainer.captioning.service import CaptionView
    from lora_trainer.doctor import Report
    from lora_trainer.jobs.service import JobService
    from lora_trainer.jobs.view import JobView


@dataclass(frozen=True)
class Checkpoint:
    """The model that would be trained on, what speaks against it, its family, of `config.presets.FAMILIES`, and why it
    is refused, if so."""

    title: str
    warnings: tuple[str, ...]
    family: str = "sd15"
    refused: str | None = None


class CaptionHost(Protocol):
    """Captions pictures off the page's thread, one run at a time."""

    @property
    def view(self) -> CaptionView: ...

    def downloads(self, captioner: str) -> list[str]:
        """What `captioner` (blip, deepbooru) would have to download first, in words."""
        ...

    def caption(self, settings: Mapping[str, object]) -> None:
        """Begin with the pictures that `settings` name: train_data_dir and metadata_path as in a training, the rest as
        in `CaptionOptions`, where captioner is blip, deepbooru or a folder. Raises UserError."""
        ...

    def stop(self) -> None: ...


class TabHost(Protocol):
    """The WebUI, as far as the tab knows it."""

    @property
    def jobs(self) -> JobService: ...

    @property
    def captioning(self) -> CaptionHost: ...

    @property
    def editor_pass(self) -> str:
        """What the page shows to the caption editor's routes."""
        ...

    def checkpoint(self) -> Checkpoint | None:
        """Of the model now loaded; never loads one."""
        ...

    def submit(self, settings: Mapping[str, object]) -> JobView:
        """Fills base_model and output_dir, builds the config and queues a job. Raises UserError."""
        ...

    def find_rate(self, settings: Mapping[str, object]) -> JobView:
        """As `submit`, with a search for a learning rate. Raises UserError."""
        ...

    def check(self, settings: Mapping[str, object]) -> Report:
        """What is wrong with the pictures and captions that `settings` name, found in seconds. Raises UserError."""
        ...

    def upload_folder(self) -> Path:
        """A new empty folder for uploaded pictures."""
        ...

    def prompt(self, job: JobView, weight: float = 0.8) -> str:
        """The words that show the job's LoRA, in a pause as it is now: `trigger words <lora:name:0.8>`."""
        ...

    def grid(self, job: JobView) -> str | None:
        """An infotext that has txt2img draw the job's saved steps side by side; None when there is nothing to
        compare, or when prompts cannot name the saved steps."""
        ...

    def send_to_txt2img(self, button: object, text: object) -> None:
        """Let a click on `button` put the value of `text` into txt2img and switch to it."""
        ...
