"""The WebUI's own BLIP and DeepBooru as captioners. Both are called under the queue lock only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules import deepbooru, devices, lowvram, paths_internal, shared
from PIL.Image import Image

from lora_trainer.captioning.words import Tag, Words
from lora_trainer.errors import ModelError, printable


@dataclass(frozen=True)
class Download:
    """What the WebUI fetches by itself when it is not there; it takes any file of that suffix in the folder."""

    file: str
    folder: str
    suffix: str
    size: str

    def is_here(self) -> bool:
        folder = Path(paths_internal.models_path) / self.folder
        return any(path.suffix.lower() == self.suffix for path in folder.rglob("*") if path.is_file())

    def __str__(self) -> str:
        return f"{self.file} ({self.size}) into models/{self.folder}"


TOKENIZER = "bert-base-uncased"
_BLIP = Download("model_base_caption_capfilt_large.pth", "BLIP", ".pth", "about 0.9 GB")
_DEEPBOORU = Download("model-resnet_custom_v3.pt", "torch_deepdanbooru", ".pt", "about 0.6 GB")


class Blip:
    """A sentence for each picture, with the beams and lengths of the WebUI's settings.

    `interrogator.load` would load CLIP too, and download it, which captions do not need: so only the parts of it that
    are about BLIP are called.
    """

    name = "the WebUI's BLIP"

    def __init__(self) -> None:
        self._model: Any = None

    @staticmethod
    def downloads() -> list[str]:
        """What the WebUI would download first, in words."""
        tokenizer = [] if _tokenizer_is_here() else [f"the tokenizer {TOKENIZER} from the Hugging Face hub"]
        return [*([] if _BLIP.is_here() else [str(_BLIP)]), *tokenizer]

    def caption(self, image: Image) -> Words:
        """Raises ModelError."""
        interrogator = shared.interrogator
        # Forge chooses a device and a number format of its own.
        device = getattr(interrogator, "load_device", None) or devices.device_interrogate
        with _loading(self.name):
            model = self._loaded(interrogator).to(device)
        before = interrogator.blip_model, interrogator.dtype
        interrogator.blip_model, interrogator.dtype = model, next(model.parameters()).dtype
        try:
            return Words(sentence=interrogator.generate_caption(image))
        finally:
            interrogator.blip_model, interrogator.dtype = before

    def rest(self) -> None:
        if self._model is not None and not shared.opts.interrogate_keep_models_in_memory:
            self._model = self._model.to(devices.cpu)
            devices.torch_gc()

    def _loaded(self, interrogator: Any) -> Any:
        """The one that the WebUI has loaded already, else one that goes when this captioner does."""
        if self._model is None:
            _make_room()
            self._model = interrogator.blip_model
        if self._model is None:
            model = interrogator.load_blip_model()
            on_cpu = getattr(interrogator, "running_on_cpu", None)
            half = not shared.cmd_opts.no_half and not on_cpu
            own = getattr(interrogator, "dtype", None) if on_cpu is None else None
            self._model = model.to(dtype=own) if own is not None else model.half() if half else model
        return self._model


class DeepBooru:
    """Tags with scores. `tag_multi` drops the scores and writes the tags as the WebUI's settings say; so the scores are
    taken where it gets them from, and the captioner's own rules apply. Tags that the settings filter stay out."""

    name = "the WebUI's DeepBooru"

    def __init__(self) -> None:
        self._started = False

    @staticmethod
    def downloads() -> list[str]:
        """What the WebUI would download first, in words."""
        return [] if _DEEPBOORU.is_here() else [str(_DEEPBOORU)]

    def caption(self, image: Image) -> Words:
        """Raises ModelError."""
        with _loading(self.name):
            if not self._started:
                _make_room()
            # Each time: a click on Interrogate DeepBooru, which asks no lock, sends it to the CPU.
            deepbooru.model.start()
            self._started = True
        scores: list[Any] = []
        with _watched(deepbooru.model.model, scores.append):
            deepbooru.model.tag_multi(image, force_disable_ranks=True)
        pairs = zip(deepbooru.model.model.tags, scores[-1][0].float().cpu().tolist(), strict=True)
        filtered = {tag.strip().replace(" ", "_") for tag in shared.opts.deepbooru_filter_tags.split(",")}
        wanted = ((tag, score) for tag, score in pairs if not tag.startswith("rating:") and tag not in filtered)
        return Words(tags=tuple(Tag(tag, score) for tag, score in wanted))

    def rest(self) -> None:
        if self._started:
            self._started = False
            deepbooru.model.stop()


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """What the WebUI's loading raises (IndexError for a download that failed) in words."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {printable((str(error) or 'no reason given').splitlines()[0], 300)}"
        raise ModelError(f"{name} cannot be loaded: {why}; expected its files whole, downloads too") from error


@contextmanager
def _watched(model: Any, tell: Callable[[Any], object]) -> Iterator[None]:
    """`tell` gets what `model` gives to this thread."""
    here = threading.get_ident()
    hook = model.register_forward_hook(lambda _, __, out: tell(out) if threading.get_ident() == here else None)
    try:
        yield
    finally:
        hook.remove()


def _make_room() -> None:
    """As before the WebUI's own interrogations."""
    if hasattr(lowvram, "send_everything_to_cpu"):
        lowvram.send_everything_to_cpu()
    devices.torch_gc()


def _tokenizer_is_here() -> bool:
    """Whether BLIP's tokenizer is in the hub's cache."""
    from transformers.utils import cached_file

    try:
        return cached_file(TOKENIZER, "vocab.txt", local_files_only=True) is not None
    except (OSError, ValueError):
        return False
