"""Captioning as the tab asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modules import devices

from lora_trainer.captioning.load import open_folder
from lora_trainer.captioning.options import CaptionOptions, build
from lora_trainer.captioning.run import Result, run
from lora_trainer.captioning.service import CaptionService, Stopping
from lora_trainer.captioning.tagger import Tagger
from lora_trainer.captioning.words import Captioner
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.events import EventSink, Notice
from lora_trainer.hosts.roots import Roots
from lora_trainer.hosts.webui.interrogators import Blip, DeepBooru
from lora_trainer.hosts.webui.turns import InTurns

_PATHS = ("train_data_dir", "metadata_path")
_OWN: dict[str, type[Blip] | type[DeepBooru]] = {"blip": Blip, "deepbooru": DeepBooru}


class Captioning(CaptionService):
    """A CaptionHost. `roots` says where paths may lie."""

    def __init__(self, roots: Callable[[], Roots]) -> None:
        super().__init__()
        self._roots = roots

    def downloads(self, captioner: str) -> list[str]:
        return _OWN[captioner].downloads() if captioner in _OWN else []

    def caption(self, settings: Mapping[str, Any]) -> None:
        """Raises UserError."""
        given = {key: value for key, value in settings.items() if key not in _PATHS}
        paths = self._roots().settings({key: settings[key] for key in _PATHS if settings.get(key)})
        if "train_data_dir" not in paths:
            raise DataError("train_data_dir: expected a folder of pictures, found nothing")
        options = build(given)
        captioner = self._captioner(options)
        folder = Path(paths["train_data_dir"])
        output = Path(paths["metadata_path"]) if "metadata_path" in paths else None

        def work(sink: EventSink, stopping: Stopping) -> Result:
            for download in self.downloads(options.captioner) if options.download else ():
                sink(Notice(text=f"the WebUI downloads {download}"))
            # A tagger runs beside whatever uses the GPU.
            if isinstance(captioner, Tagger):
                return run(folder, captioner, options, output=output, sink=sink, stopping=stopping)
            turns = InTurns(captioner, stopping)
            return run(folder, turns, options, output=output, sink=sink, stopping=turns.stopping)

        self.start(work)

    def _captioner(self, options: CaptionOptions) -> Captioner:
        """Raises UserError, also for what would have to be downloaded and may not."""
        if options.captioner not in _OWN:
            if not options.captioner.strip():
                raise ConfigError(["captioner: expected the folder of a captioner or tagger, found nothing"])
            folder = self._roots().check("captioner", options.captioner)
            return open_folder(folder, str(devices.device_interrogate))
        missing = self.downloads(options.captioner)
        if missing and not options.download:
            raise ConfigError(
                [f"captioner: the WebUI would first download {' and '.join(missing)}; tick Download for it"]
            )
        return _OWN[options.captioner]()
