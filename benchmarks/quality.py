"""What settings are worth: the held-out loss of LoRAs trained on the bundled world, in several styles and from several
seeds, with the same number of pictures seen.

usage: python -m benchmarks.quality [--settings default kohya …] [--styles ink …] [--seeds 1 2 3] [--visits 1200]
                                    [--pictures 120] [--validations 0] [--held-out 64] [key=value …] >> RESULTS.jsonl

Prints one line of JSON a run: the held-out curve, the base model's value first. `key=value` goes to all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from benchmarks.styles import STYLES, folders
from lora_trainer.config import Config
from lora_trainer.config.sources import parse_overrides
from lora_trainer.demo import demo_config
from lora_trainer.events import AnyEvent, Validated
from lora_trainer.hosts.standalone import train

_NO_DROPOUT = {"lora_dropout": 0.0}
# What other trainers offer a beginner, in our terms, the UNet alone in all of them.
SETTINGS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "default": {},
        # kohya_ss, the GUI's start values
        "kohya": _NO_DROPOUT
        | {
            "lora_rank": 8,
            "lora_alpha": 1,
            "learning_rate": 1e-4,
            "batch_size": 1,
            "lr_scheduler": "cosine",
            "lr_warmup_ratio": 0.1,
        },
        # OneTrainer, "sd 1.5 LoRA"
        "onetrainer": _NO_DROPOUT
        | {"lora_rank": 16, "lora_alpha": 1, "learning_rate": 3e-4, "batch_size": 4, "lr_warmup_steps": 200},
        # ai-toolkit, config/examples
        "ai-toolkit": _NO_DROPOUT | {"lora_rank": 32, "lora_alpha": 32, "learning_rate": 1e-4, "batch_size": 1},
        # lora-scripts, the form's start values
        "lora-scripts": _NO_DROPOUT
        | {
            "lora_rank": 32,
            "lora_alpha": 32,
            "learning_rate": 1e-4,
            "batch_size": 1,
            "lr_scheduler": "cosine_with_restarts",
        },
        # sd-webui-traintrain, the form's start values
        "traintrain": _NO_DROPOUT
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
    settings |= parse_overrides(asked.overrides)
    learned, held_out = folders(style, work)
    paths = {
        "train_data_dir": part(learned, asked.pictures, work),
        "metadata_path": None,
        "validation_data_dir": part(held_out, asked.held_out, work),
    }
    steps = math.ceil(asked.visits / (int(settings["batch_size"]) * int(settings["gradient_accumulation_steps"])))
    every = max(1, steps // asked.validations) if asked.validations else 0
    settings |= {"seed": seed, "max_train_steps": steps, "epochs": 100_000, "validate_every": every}
    fixed = {"cpu_threads": 1, "checkpoint_every": 0, "log_with": "csv", "cache_dir": str(work / "cache")}
    return demo_config(work / f"{name}-{style}-{seed}", **{**settings, **paths, **fixed})


def part(folder: Path, count: int, work: Path) -> str:
    """A folder of links to every n-th picture of `folder`, so that `count` are left."""
    chosen = work / f"{folder.name}-{count}"
    rows = sorted((folder / "metadata.csv").read_text(encoding="utf-8").splitlines())
    if not chosen.exists():
        chosen.mkdir()
        kept = [rows[number * len(rows) // count] for number in range(min(count, len(rows)))]
        for row in kept:
            name = row.partition(",")[0]
            (chosen / name).symlink_to(folder / name)
        (chosen / "metadata.csv").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return str(chosen)


def measure(config: Config) -> dict[str, object]:
    """Train, and what was found on the way."""
    curve: list[tuple[int, float]] = []

    def watch(event: AnyEvent) -> None:
        if isinstance(event, Validated):
            curve.append((event.step, event.lora))

    began = time.perf_counter()
    finished = train(config, watch)
    return {
        "steps": finished.steps,
        "base": finished.validation_base,
        "final": finished.validation_lora,
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
        "file": finished.output[-1],
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--visits", type=int, default=1200)
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--validations", type=int, default=0)
    parser.add_argument("--label", default="", help="instead of the settings' name in the results")
    parser.add_argument("--work", type=Path, default=None, help="where LoRAs and pictures go; a temporary folder")
    parser.add_argument("--override", dest="overrides", nargs="*", default=[], metavar="key=value")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for seed in asked.seeds:
            for style in asked.styles:
                for name in asked.settings:
                    found = measure(config_of(name, style, seed, work, asked))
                    about = {"settings": asked.label or name, "style": style, "seed": seed, "visits": asked.visits}
                    print(json.dumps({**about, "pictures": asked.pictures, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
