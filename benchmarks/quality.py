"""What settings are worth: the held-out loss of LoRAs trained on the bundled world, in several styles or of several
figures and from several seeds, with the same number of pictures seen.

usage: python -m benchmarks.quality [--settings default kohya …] [--styles ink … zorbin …] [--seeds 1 2 3]
                                    [--visits 1200] [--pictures 120] [--validations 0] [--held-out 64] [--workers 1]
                                    [--base FILE --family sdxl] [--compare-always] [--override key=value …]
                                    >> RESULTS.jsonl

Prints one line of JSON a run: the held-out curve, fidelity and drift where they were measured, what was warned of.
`--override` goes to all of them. Several workers fill a GPU, for which one of these runs is too small. With
`--compare-always` fidelity and drift are measured at each validation, whatever it costs. `--base` is another model of
the same pictures than the bundled one (`tools/demo_world` makes one of SDXL's form); a preset's settings are those for
`--family`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import MappingProxyType

from benchmarks.figures import FIGURES, write_figure
from benchmarks.styles import STYLES, folders
from lora_trainer.config import Config
from lora_trainer.config.presets import FAMILIES, preset_values
from lora_trainer.config.sources import parse_overrides
from lora_trainer.demo import demo_config
from lora_trainer.events import AnyEvent, Compared, Notice, Progress, Validated
from lora_trainer.hosts.standalone import train
from lora_trainer.training import fidelity

PRESETS = ("style", "character", "object")
# What a default of ours would add to other trainers' settings.
_PLAIN = {"lora_dropout": 0.0, "loraplus_lr_ratio": 1.0, "ema_decay": 0.0}
# What other trainers offer a beginner, in our terms, the UNet alone in all of them.
SETTINGS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "default": {},
        # As they are for the family.
        **{name: {} for name in PRESETS},
        # kohya_ss, the GUI's start values
        "kohya": _PLAIN
        | {
            "lora_rank": 8,
            "lora_alpha": 1,
            "learning_rate": 1e-4,
            "batch_size": 1,
            "lr_scheduler": "cosine",
            "lr_warmup_ratio": 0.1,
        },
        # OneTrainer, "sd 1.5 LoRA"
        "onetrainer": _PLAIN
        | {"lora_rank": 16, "lora_alpha": 1, "learning_rate": 3e-4, "batch_size": 4, "lr_warmup_steps": 200},
        # ai-toolkit, config/examples
        "ai-toolkit": _PLAIN | {"lora_rank": 32, "lora_alpha": 32, "learning_rate": 1e-4, "batch_size": 1},
        # lora-scripts, the form's start values
        "lora-scripts": _PLAIN
        | {
            "lora_rank": 32,
            "lora_alpha": 32,
            "learning_rate": 1e-4,
            "batch_size": 1,
            "lr_scheduler": "cosine_with_restarts",
        },
        # sd-webui-traintrain, the form's start values
        "traintrain": _PLAIN
        | {
            "lora_rank": 16,
            "lora_alpha": 8,
            "learning_rate": 1e-4,
            "batch_size": 2,
            "lr_scheduler": "cosine",
            "min_snr_gamma": 5,
        },
    }
)


def config_of(name: str, style: str, seed: int, work: Path, asked: argparse.Namespace) -> Config:
    """The demo's settings with those of `name`, and as many steps as see `asked.visits` pictures."""
    settings = {"gradient_accumulation_steps": 1, "batch_size": 4, "save_steps": 0, **SETTINGS[name]}
    settings |= preset_values(name, asked.family)
    settings |= parse_overrides(asked.overrides)
    learned, held_out = prepare(style, work, asked)
    paths = {"train_data_dir": learned, "metadata_path": None, "validation_data_dir": held_out}
    steps = math.ceil(asked.visits / (int(settings["batch_size"]) * int(settings["gradient_accumulation_steps"])))
    every = max(1, steps // asked.validations) if asked.validations else 0
    settings |= {"seed": seed, "max_train_steps": steps, "epochs": 100_000, "validate_every": every}
    fixed = {"cpu_threads": 1, "checkpoint_every": 0, "log_with": "csv", "cache_dir": str(work / "cache")}
    if asked.base:
        fixed["base_model"] = str(asked.base)
    return demo_config(work / f"{name}-{style}-{seed}", **{**settings, **paths, **fixed})


def prepare(style: str, work: Path, asked: argparse.Namespace) -> tuple[str, str]:
    """The folders with so many pictures of a style or figure to learn and held out; written where they are missing."""
    parts = [work / f"{style}-{asked.pictures}", work / f"{style}-held-out-{asked.held_out}"]
    if not all(path.exists() for path in parts):
        written = write_figure(style, work) if style in FIGURES else folders(style, work)
        for folder, path, count in zip(written, parts, (asked.pictures, asked.held_out), strict=True):
            part(folder, count, path)
    return str(parts[0]), str(parts[1])


def part(folder: Path, count: int, chosen: Path) -> None:
    """Links in `chosen` to every n-th picture of `folder`, so that there are `count`."""
    rows = sorted((folder / "metadata.csv").read_text(encoding="utf-8").splitlines())
    chosen.mkdir(exist_ok=True)
    kept = [rows[number * len(rows) // count] for number in range(min(count, len(rows)))]
    for row in kept:
        name = row.partition(",")[0]
        (chosen / name).symlink_to(folder / name)
    (chosen / "metadata.csv").write_text("\n".join(kept) + "\n", encoding="utf-8")


def measure(config: Config) -> dict[str, object]:
    """Train, and what was found on the way."""
    curve: list[tuple[int, float, float | None]] = []
    compared: list[tuple[int, float, float, float]] = []
    warned: list[tuple[int, str]] = []
    taken = {"validating": 0.0, "comparing": 0.0}
    since = 0.0

    def watch(event: AnyEvent) -> None:
        nonlocal since
        if isinstance(event, Validated):
            curve.append((event.step, event.lora, event.train))
        elif isinstance(event, Compared):
            compared.append((event.step, event.likeness, event.drift, event.score))
        elif isinstance(event, Notice) and curve:
            warned.append((curve[-1][0], event.text))
        elif isinstance(event, Progress) and event.stage in taken:
            now = time.perf_counter()
            taken[event.stage] += now - since if event.done else 0.0
            since = now

    began = time.perf_counter()
    finished = train(config, watch)
    return {
        "steps": finished.steps,
        "base": finished.validation_base,
        "final": curve[-1][1],
        "best_step": finished.best_step,
        "overfit": finished.overfit,
        "curve": curve,
        "compared": compared,
        "notices": warned,
        "seconds": round(time.perf_counter() - began, 1),
        "training_seconds": finished.seconds,
        **{f"{stage}_seconds": round(seconds, 2) for stage, seconds in taken.items()},
        "files": finished.output,
    }


def run(name: str, style: str, seed: int, work: Path, asked: argparse.Namespace) -> str:
    """One run's line of JSON."""
    if asked.compare_always:
        fidelity.SHARE = 100.0
    found = measure(config_of(name, style, seed, work, asked))
    about = {"settings": asked.label or name, "style": style, "seed": seed, "visits": asked.visits}
    return json.dumps({**about, "pictures": asked.pictures, **found})


def end_with_parent() -> None:
    """A worker of a killed benchmark would go on for as long as its run takes."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[n for n in SETTINGS if n not in PRESETS])
    parser.add_argument("--styles", nargs="+", choices=[*STYLES, *FIGURES], default=list(STYLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--visits", type=int, default=1200)
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--validations", type=int, default=0)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--compare-always", action="store_true")
    parser.add_argument("--label", default="", help="instead of the settings' name in the results")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, default=None, help="where LoRAs and pictures go; a temporary folder")
    parser.add_argument("--override", dest="overrides", nargs="*", default=[], metavar="key=value")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for style in asked.styles:
            prepare(style, work, asked)
        runs = [(n, style, seed) for seed in asked.seeds for style in asked.styles for n in asked.settings]
        with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
            for done in as_completed([pool.submit(run, *one, work, asked) for one in runs]):
                print(done.result(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
