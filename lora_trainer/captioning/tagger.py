"""Taggers in the layout of SmilingWolf's WD14: model.onnx and selected_tags.csv (huggingface.co/SmilingWolf)."""

from __future__ import annotations

import csv
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_trainer.captioning.words import CHARACTER, GENERAL, Tag, Words
from lora_trainer.errors import ConfigError, ModelError, printable

# The column `category` of selected_tags.csv: 0 is everything else.
_CHARACTER, _RATING = "4", "9"
USUAL_SIZE = 448


class Tagger:
    """The tags of an ONNX model, in its own order; ratings are left out.

    The model takes float32 [1, S, S, 3], BGR from 0 to 255, and gives scores [1, tags] from 0 to 1. It runs on the
    CPU, so that nothing else waits for it. Raises ConfigError without onnxruntime, ModelError for a folder that does
    not hold such a model.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = folder.resolve().name
        self._tags = read_tags(folder / "selected_tags.csv")
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            raise ConfigError(
                ["captioner: taggers need onnxruntime, which is not installed: pip install onnxruntime"]
            ) from None

    def caption(self, image: Image.Image) -> Words:
        """Raises ModelError."""
        session, size = self._session
        pixels = prepared(image, size)[None]
        (scores, *_) = session.run(None, {session.get_inputs()[0].name: pixels})
        if scores.shape != (1, len(self._tags)):
            counted = f"{len(self._tags)} tags in selected_tags.csv, {scores.shape} scores from model.onnx"
            raise ModelError(f"{self._folder}: expected a score for each tag, found {counted}")
        pairs = zip(self._tags, scores[0].tolist(), strict=True)
        return Words(tags=tuple(Tag(name, score, kind) for (name, kind), score in pairs if kind is not None))

    def rest(self) -> None:
        """Nothing of it is on a GPU."""

    @cached_property
    def _session(self) -> tuple[Any, int]:
        """The model and the side of its pictures in pixels."""
        import onnxruntime

        file = self._folder / "model.onnx"
        try:
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:
            # Each kind of damage has an exception of its own.
            raise ModelError(f"{file}: not an ONNX model that onnxruntime loads: {_line(error)}") from error
        shape = session.get_inputs()[0].shape
        if len(shape) != 4 or shape[3] != 3:
            raise ModelError(f"{file}: expected pictures as [batch, height, width, 3], found {shape}")
        return session, shape[1] if isinstance(shape[1], int) else USUAL_SIZE


def read_tags(file: Path) -> tuple[tuple[str, str | None], ...]:
    """(name, kind) of each tag; the kind of ratings is None. Raises ModelError."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            rows = [(row["name"], row["category"]) for row in csv.DictReader(text)]
    except (KeyError, csv.Error, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: expected columns name and category, found none: {_line(error)}") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    if not rows or not all(name for name, _ in rows):
        raise ModelError(f"{file}: expected a name in each row, found none")
    return tuple(
        (name, None if kind == _RATING else CHARACTER if kind == _CHARACTER else GENERAL) for name, kind in rows
    )


def prepared(image: Image.Image, size: int) -> np.ndarray:
    """An RGB picture padded to a white square in its middle, scaled: float32 [size, size, 3], BGR, 0 to 255."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    scaled = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(scaled, np.float32)[:, :, ::-1])


def _line(error: Exception) -> str:
    return printable((str(error) or type(error).__name__).splitlines()[0], 300)
