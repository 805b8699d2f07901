"""`lora-trainer check`: a report for a person or a machine, and a contact sheet."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_trainer.config import Config
from lora_trainer.config.convert import Problem, convert
from lora_trainer.config.options import options
from lora_trainer.config.schema import Concept
from lora_trainer.dataset.crops import sizes_of
from lora_trainer.dataset.items import read_folder
from lora_trainer.doctor import crops, sheet
from lora_trainer.doctor.examine import examine
from lora_trainer.doctor.subject import Wanted
from lora_trainer.doctor.text import lines
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.events import EventSink

MIN_RESOLUTION, MAX_RESOLUTION = 64, 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)
    parser.add_argument("--metadata", type=Path, help="a caption file elsewhere or under another name")
    parser.add_argument(
        "--concept", action="append", default=[], help="one of the training's concepts; may be given more than once"
    )
    parser.add_argument("--trigger-words", default="", help="as the training will be given them")
    parser.add_argument("--resolution", type=int, default=Wanted.resolution, help="as the training will be given it")
    parser.add_argument("--masked-loss", action="store_true", help="as the training will be given it")
    parser.add_argument("--json", action="store_true", help="the report as JSON on standard output")
    parser.add_argument("--sheet", type=Path, help="draw the pictures with their findings: a .png or .jpg file")


def check(arguments: argparse.Namespace, sink: EventSink) -> bool:
    """Print the report; whether it is free of errors. Raises UserError."""
    if not MIN_RESOLUTION <= arguments.resolution <= MAX_RESOLUTION:
        bounds = f"{MIN_RESOLUTION} to {MAX_RESOLUTION}"
        raise ConfigError([f"resolution: expected {bounds}, found {arguments.resolution}"])
    if arguments.sheet:
        sheet.check_name(arguments.sheet)
    wanted = Wanted(arguments.resolution, trigger_words=arguments.trigger_words, masked=arguments.masked_loss)
    with quiet_pillow():
        report = examine(
            arguments.folder,
            metadata=arguments.metadata,
            concepts=_concepts(arguments.concept),
            wanted=wanted,
            sink=sink,
        )
    # Names may hold what the terminal's encoding does not.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments.json:
        print(json.dumps(report.as_dict()))
    else:
        print("\n".join(lines(report)))
    if arguments.sheet:
        with quiet_pillow():
            sheet.write(sheet.draw(report), arguments.sheet)
        print(arguments.sheet, file=sys.stderr)
    return report.count("error") == 0


def draw_crops(config: Config, path: Path) -> None:
    """What `config` makes of its pictures, under `path`. Raises UserError."""
    if not config.train_data_dir:
        raise DataError("train_data_dir: expected a folder of pictures, found nothing")
    files = read_folder(Path(config.train_data_dir), concepts=config.concepts).images
    if len(files) > crops.MOST:
        print(f"the first {crops.MOST} of {len(files)} pictures", file=sys.stderr)
    with quiet_pillow():
        sheet.write(crops.draw(files, sizes_of(config, Wanted.resolution)), path)


def _concepts(given: Sequence[str]) -> list[Concept]:
    try:
        return convert(options()["concepts"], given)
    except Problem as problem:
        raise ConfigError([str(problem)]) from None


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Without its words about damaged and large files, which the report tells with their names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
