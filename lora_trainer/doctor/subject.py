"""What the checks look at: everything known about one folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_trainer.dataset.buckets import Placement, place
from lora_trainer.dataset.items import FROM_NAME, STAND_INS, Contents
from lora_trainer.doctor.pictures import Measures, Picture


@dataclass(frozen=True)
class Wanted:
    """What the training will be told. `masked`: masked_loss, for which transparent parts are the mask."""

    resolution: int = 512
    allow_upscaling: bool = False
    trigger_words: str = ""
    masked: bool = False


@dataclass(frozen=True)
class Subject:
    """A folder as training reads it, what that complains of (file or folder, in words), and its pictures."""

    folder: Path
    contents: Contents
    problems: tuple[tuple[Path, str], ...]
    pictures: tuple[Picture, ...]
    wanted: Wanted

    @cached_property
    def captions(self) -> Mapping[Path, str]:
        """Those that training would use, several of one picture as one. With a caption file that cannot be read it
        would not fall back to names."""
        found = self.contents.captions
        broken = any(file != self.folder and not file.is_dir() for file, _ in self.problems)
        return {
            image: text.replace("\n", ", ")
            for image, (text, source) in found.items()
            if not (broken and source in STAND_INS)
        }

    @property
    def from_names(self) -> bool:
        """Whether file names serve as captions."""
        return any(self.contents.captions[image][1] == FROM_NAME for image in self.captions)

    @cached_property
    def readable(self) -> tuple[Picture, ...]:
        return tuple(picture for picture in self.pictures if picture.measures is not None)

    def measured(self) -> Iterator[tuple[Path, Measures]]:
        for picture in self.readable:
            assert picture.measures is not None
            yield picture.path, picture.measures

    @cached_property
    def placed(self) -> Mapping[Path, Placement | str]:
        """Where each readable picture goes in training, or why it is left out."""
        found: dict[Path, Placement | str] = {}
        for picture in self.readable:
            assert picture.facts is not None
            try:
                found[picture.path] = place(
                    picture.facts.size, self.wanted.resolution, allow_upscaling=self.wanted.allow_upscaling
                )
            except ValueError as error:
                found[picture.path] = str(error)
        return found

    @property
    def usable(self) -> int:
        return sum(isinstance(where, Placement) for where in self.placed.values())
