"""`lora-trainer caption`: its flags are the declared options."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_trainer.captioning.load import load
from lora_trainer.captioning.options import build, caption_options
from lora_trainer.captioning.run import Result, run
from lora_trainer.doctor.command import quiet_pillow
from lora_trainer.events import EventSink, Notice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="the folder of pictures")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a .csv or .jsonl; else the folder's own, or a .txt for each picture",
    )
    for key, option in caption_options().items():
        flag, text = f"--{key.replace('_', '-')}", option.help.replace("%", "%%")
        if option.kind is bool:
            kind = argparse.BooleanOptionalAction if option.default else "store_true"
            parser.add_argument(flag, action=kind, default=None, help=text)
        else:
            parser.add_argument(flag, choices=option.choices or None, help=text)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on standard output")


def caption(arguments: argparse.Namespace, sink: EventSink) -> Result:
    """Raises UserError."""
    given = {key: getattr(arguments, key) for key in caption_options()}
    options = build({key: value for key, value in given.items() if value is not None})
    captioner = load(options, lambda text: sink(Notice(text=text)))
    with quiet_pillow():
        return run(arguments.input, captioner, options, output=arguments.output, sink=sink)
