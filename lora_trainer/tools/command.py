"""The command line's tools on LoRA files: what they are asked, and what they answer."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_trainer.errors import ConfigError
from lora_trainer.events import EventSink

# `adapters` knows these too; it needs torch, which a command line must not wait for.
FORMS = ("kohya", "ldm", "diffusers", "peft")
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")
PRECISIONS = ("fp16", "bf16", "fp32")


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="a LoRA file, or a folder as PEFT saves it")
    parser.add_argument("target", type=Path, metavar="OUT", help="a .safetensors file; for peft a folder")
    parser.add_argument("--to", choices=FORMS, required=True, help="whose names the file is to have")
    _add_family(parser)
    _add_overwrite(parser)


def add_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--rank", type=int, required=True, help="the largest rank that a module may have")
    parser.add_argument("--dynamic", choices=METHODS, help="choose each module's rank up to that, by --value")
    parser.add_argument("--value", type=float, help="of --dynamic, as in kohya's tool")
    _add_precision(parser, "the number format of OUT; as IN when left out")
    _add_family(parser)
    _add_overwrite(parser)


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("files", nargs="+", metavar="FILE:WEIGHT", help="a LoRA and the weight of a prompt, else 1")
    parser.add_argument("--into", type=Path, metavar="CHECKPOINT", help="add them to a copy of this checkpoint")
    parser.add_argument("--rank", type=int, help="cut the LoRA down to this rank")
    _add_precision(parser, "the number format of OUT; the widest of the files' when left out")
    _add_family(parser)
    _add_overwrite(parser)


def add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("original", type=Path, metavar="ORIGINAL", help="the checkpoint that the LoRA is for")
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="the checkpoint that it is to lead to")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--conv-rank", type=int, help="take convolutions too, with this rank")
    parser.add_argument("--no-text-encoder", action="store_true", help="the UNet alone")
    _add_precision(parser, "the number format of OUT", default="fp16")
    parser.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda, cuda:1 and so on")
    _add_overwrite(parser)


def convert(arguments: argparse.Namespace) -> list[str]:
    from lora_trainer.tools.convert import convert

    return convert(
        arguments.source, arguments.target, arguments.to, family=arguments.family, overwrite=arguments.overwrite
    )


def resize(arguments: argparse.Namespace) -> list[str]:
    from lora_trainer.adapters.svd import Rule
    from lora_trainer.tools.resize import resize

    if (arguments.dynamic is None) != (arguments.value is None):
        raise ConfigError(["resize: expected --dynamic and --value together, found one of them"])
    rule = Rule(arguments.rank, arguments.dynamic, arguments.value or 0.0)
    return resize(arguments.source, arguments.target, rule, **_common(arguments))


def merge(arguments: argparse.Namespace) -> list[str]:
    from lora_trainer.tools.merge import Weighted, merge
    from lora_trainer.tools.merge_into import merge_into

    files = [Weighted.parse(text) for text in arguments.files]
    if arguments.into is None:
        return merge(files, arguments.target, rank=arguments.rank, **_common(arguments))
    if arguments.rank is not None or arguments.precision is not None:
        raise ConfigError(
            ["merge: expected no --rank and no --precision with --into, since a checkpoint keeps its own"]
        )
    return merge_into(arguments.into, files, arguments.target, family=arguments.family, overwrite=arguments.overwrite)


def extract(arguments: argparse.Namespace, sink: EventSink) -> list[str]:
    from lora_trainer.hosts.standalone import clock, device_of
    from lora_trainer.tools.extract import Recipe, extract

    recipe = Recipe(
        arguments.rank,
        arguments.conv_rank,
        arguments.precision,
        not arguments.no_text_encoder,
        str(device_of(arguments.device)),
        clock(),
    )
    paths = arguments.original, arguments.tuned, arguments.target
    return extract(*paths, recipe, sink=sink, overwrite=arguments.overwrite)


def _common(arguments: argparse.Namespace) -> dict[str, object]:
    return {key: getattr(arguments, key) for key in ("precision", "family", "overwrite")}


def _add_family(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=FAMILIES, help="for a file that does not tell what it is made for")


def _add_precision(parser: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    parser.add_argument("--precision", choices=PRECISIONS, default=default, help=text)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
