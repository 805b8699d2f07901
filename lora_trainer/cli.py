"""The command line: a thin skin over config, training and inspection.

Exit codes: 0 done, 1 failure, 2 bad settings or data, 130 stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lora_trainer import __version__
from lora_trainer.captioning import command as captioning
from lora_trainer.config import Config, build
from lora_trainer.config.export import preset_table, table
from lora_trainer.config.sample_options import SampleOptions
from lora_trainer.config.sources import family_of, parse_overrides, read_file
from lora_trainer.doctor import command as doctor
from lora_trainer.errors import UserError, printable
from lora_trainer.events import Finished
from lora_trainer.imports import command as imports
from lora_trainer.logs import TerminalLog
from lora_trainer.report import report
from lora_trainer.tools import command as tools

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in (_train, _find_lr, _crops):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.command(arguments, [*getattr(arguments, "overrides", []), *rest])
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except Exception as error:
        print(f"failed: {type(error).__name__}: {error} ({_report(error, arguments.debug)})", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-trainer", description="Train a LoRA from a folder of pictures.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lora-trainer {__version__}")
    parser.add_argument("--debug", action="store_true", help="print the details of a failure, with its traceback")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=command)
        return sub

    train = add("train", _train, "Train a LoRA. Options of the config go as key=value or --key value.")
    train.add_argument("--config", type=Path, help="a .yaml or .json file, or a LoRA whose run is repeated")
    train.add_argument("--json", action="store_true", help="end with one line of JSON on standard output")
    train.add_argument("--resume", action="store_true", help="go on with the run in output_dir, or start it")
    finder = add("find-lr", _find_lr, "Find a learning rate: a short run in which it rises. Options as for train.")
    finder.add_argument("--config", type=Path, help="a .yaml or .json file, or a LoRA whose run is repeated")
    finder.add_argument("--json", action="store_true", help="end with one line of JSON on standard output")
    check = add("check", _check, "Look at a folder of pictures and captions before training on it.")
    doctor.add_arguments(check)
    caption = add("caption", _caption, "Write captions for a folder of pictures with a model.")
    captioning.add_arguments(caption)
    crops = add("crops", _crops, "Draw what training will see of each picture. Options as for train.")
    crops.add_argument("--config", type=Path, help="a .yaml or .json file, or a LoRA whose run is repeated")
    crops.add_argument("--out", type=Path, default=Path("crops.png"), help="a .png or .jpg file")
    importing = add("import", _import, "Turn a file of kohya, lora-scripts or OneTrainer into settings for train.")
    imports.add_arguments(importing)
    demo = add("demo", _demo, "Train on the bundled pictures and draw what changed.")
    demo.add_argument("--out", type=Path, default=Path("demo-output"))
    demo.add_argument("--json", action="store_true", help="end with one line of JSON on standard output")
    inspect = add("inspect", _inspect, "Say what a LoRA file is, how it was trained, and its norms.")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true")
    tools.add_convert(add("convert", _convert, "Give a LoRA the names that another program reads."))
    tools.add_resize(add("resize", _resize, "Make a LoRA of a lower rank."))
    tools.add_merge(add("merge", _merge, "Put several LoRAs into one, or into a checkpoint."))
    tools.add_extract(add("extract", _extract, "Make a LoRA of the difference of two checkpoints."))
    sample = add("sample", _sample, "Draw prompts without and with a LoRA, side by side.")
    sample.add_argument("--base", type=Path, required=True)
    sample.add_argument("--lora", type=Path, required=True)
    sample.add_argument("--prompt", action="append", required=True, help="may be given more than once")
    _add_sample_options(sample)
    add("options", _options, "Print the tables of options and presets.")
    return parser


def _add_sample_options(sample: argparse.ArgumentParser) -> None:
    defaults = SampleOptions()
    for name, kind in (("weight", float), ("out", str), ("seed", int), ("steps", int), ("guidance", float)):
        sample.add_argument(f"--{name}", type=kind, default=getattr(defaults, name))
    sample.add_argument("--size", type=int, default=None)
    sample.add_argument("--negative", default=defaults.negative)


def config_of(path: Path | None, overrides: Sequence[str], **known: object) -> Config:
    """The config of what is `known`, a file (or none) and command-line overrides. Raises ConfigError."""
    sources = (known, read_file(path) if path else {}, parse_overrides(overrides))
    return build(*sources, family=family_of(*sources))


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = config_of(arguments.config, overrides)
    from lora_trainer.hosts.standalone import train

    return _finish(train(config, TerminalLog(), resumes=arguments.resume), arguments.json)


def _find_lr(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = config_of(arguments.config, overrides)
    from lora_trainer.hosts.standalone import find_learning_rate

    log = TerminalLog()
    try:
        finding = find_learning_rate(config, log)
    finally:
        log.close()
    print(json.dumps(finding.as_dict()) if arguments.json else f"{finding.summary}: {finding.why}")
    return DONE


def _check(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    log = TerminalLog()
    try:
        return DONE if doctor.check(arguments, log) else BAD_INPUT
    finally:
        log.close()


def _caption(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    log = TerminalLog()
    try:
        result = captioning.caption(arguments, log)
    finally:
        log.close()
    print(json.dumps(result.as_dict()) if arguments.json else result.summary())
    return DONE


def _crops(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    # Nothing is trained: any base model will do.
    doctor.draw_crops(config_of(arguments.config, overrides, base_model="any"), arguments.out)
    print(arguments.out)
    return DONE


def _import(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    imports.run(arguments)
    return DONE


def _demo(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    from lora_trainer.demo import run_demo

    return _finish(run_demo(arguments.out, TerminalLog()), arguments.json)


def _inspect(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    from lora_trainer.adapters.inspect import describe

    report = describe(arguments.file)
    print(report.to_json() if arguments.json else "\n".join(report.lines()))
    return DONE


def _convert(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    return _told(tools.convert(arguments))


def _resize(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    return _told(tools.resize(arguments))


def _merge(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    return _told(tools.merge(arguments))


def _extract(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    log = TerminalLog()
    try:
        return _told(tools.extract(arguments, log))
    finally:
        log.close()


def _told(lines: Sequence[str]) -> int:
    print("\n".join(map(printable, lines)))
    return DONE


def _sample(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    from lora_trainer.draw import sample_command

    names = SampleOptions.__struct_fields__
    options = SampleOptions(**{name: getattr(arguments, name) for name in names})
    for path in sample_command(arguments.base, arguments.lora, arguments.prompt, options=options):
        print(path)
    return DONE


def _options(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    print(f"{table()}\n{preset_table()}", end="")
    return DONE


def _finish(finished: Finished, as_json: bool) -> int:
    validation = None
    if finished.validation_base is not None:
        validation = {
            "base": finished.validation_base,
            "lora": finished.validation_lora,
            "train": finished.validation_train,
            "best_step": finished.best_step,
            "overfit": finished.overfit,
        }
    result = {
        "state": finished.state,
        "output": finished.output,
        "steps": finished.steps,
        "loss": finished.loss,
        "validation": validation,
        "seconds": round(finished.seconds, 3),
    }
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    return STOPPED if finished.state == "stopped" else DONE


def _report(error: Exception, debug: bool) -> str:
    """Where the details went."""
    text = report(error)
    if debug:
        print(text, file=sys.stderr)
        return "details above"
    with tempfile.NamedTemporaryFile(
        "w", prefix="lora-trainer-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    return f"details for an issue in {file.name}"


if __name__ == "__main__":
    sys.exit(main())
