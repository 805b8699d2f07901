"""A captioner by its folder, or by its name on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lora_trainer.captioning.options import CaptionOptions
from lora_trainer.captioning.words import Captioner
from lora_trainer.errors import ConfigError, ModelError, printable

TAGGER_FILES = ("model.onnx", "selected_tags.csv")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load(options: CaptionOptions, say: Callable[[str], object] = lambda text: None) -> Captioner:
    """What `options.captioner` names. The model itself is loaded when the first picture comes; `say` is told before
    anything is downloaded. Raises ConfigError, ModelError."""
    name = options.captioner
    folder = Path(name).expanduser()
    if folder.is_dir():
        return open_folder(folder, options.device)
    if folder.exists() or not _HUB_NAME.fullmatch(name):
        raise ConfigError([f"captioner: expected a folder, or a name on the Hugging Face hub, found {name}"])
    if not options.download:
        raise ConfigError(
            [
                f"captioner: {name} is no folder here; a name on the Hugging Face hub is used only with --download, "
                "which downloads it; or name a folder with --captioner"
            ]
        )
    say(f"downloading {name} from the Hugging Face hub, unless it is here already")
    return open_folder(_downloaded(name), options.device)


def open_folder(folder: Path, device: str = "auto") -> Captioner:
    """The tagger or the transformers captioner in `folder`. Raises ConfigError, ModelError."""
    if all((folder / file).is_file() for file in TAGGER_FILES):
        from lora_trainer.captioning.tagger import Tagger

        return Tagger(folder)
    if (folder / "config.json").is_file():
        from lora_trainer.captioning.sentences import Sentences

        return Sentences(folder, device)
    raise ModelError(
        f"{folder}: expected a captioner of transformers (config.json, model.safetensors, …) "
        f"or a tagger ({', '.join(TAGGER_FILES)}), found neither"
    )


def _downloaded(name: str) -> Path:
    """The folder of the hub's cache that has what a captioner needs. Raises ModelError."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi().list_repo_files(name)
        is_tagger = set(TAGGER_FILES) <= set(files)
        wanted = [*TAGGER_FILES] if is_tagger else ["*.json", "*.txt", "*.model", "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        # Of the hub's library, of what it uses for HTTP, and of the disk.
        why = printable((str(error) or type(error).__name__).splitlines()[0], 300)
        raise ModelError(f"{name}: could not be downloaded from the Hugging Face hub: {why}") from error
