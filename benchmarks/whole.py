"""A whole run, as it is started where the model is in the process already: pictures, feed, steps, logs, saves.

usage: python -m benchmarks.whole [--steps 2500] [--batch 4] [--pictures 40] [--resolution 512] [--device auto]
                                  [--override key=value …]

Prints one line of JSON: seconds from the call to the first finished step, the median step, and how many times as long
as so many steps the whole run took. Before it a short run compiles the kernels and encodes the pictures, as an
earlier run of the same user would have.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import models
from benchmarks.step import Clock
from benchmarks.timing import gaps, machine, peak_reserved, spread
from lora_trainer.config import Config, build
from lora_trainer.config.sources import parse_overrides
from lora_trainer.events import AnyEvent, Notice
from lora_trainer.hosts.ports import Host
from lora_trainer.hosts.standalone import device_of, host_of, in_background
from lora_trainer.logs import CsvLog, TensorBoardLog, fan_out
from lora_trainer.training.run import run


def write_pictures(folder: Path, count: int, size: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(models.SEED)
    for number in range(count):
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png", compress_level=1)
        (folder / f"{number:03}.txt").write_text(f"a photo of picture number {number}, made of noise")


def measure(config: Config, host: Host) -> dict[str, object]:
    """One run on the host's model, logged as the command line logs it."""
    clock, told = Clock(), []

    def watch(event: AnyEvent) -> None:
        if isinstance(event, Notice):
            told.append(event.text)

    kinds = [CsvLog] + ([TensorBoardLog] if config.log_with == "tensorboard" else [])
    began = time.perf_counter()
    with fan_out(watch, *(kind(Path(config.output_dir) / "logs") for kind in kinds)) as events:
        finished = run(config, replace(host, lease=clock), events)
    whole = time.perf_counter() - began
    steps = spread(gaps(clock.stamps))
    return {
        "first_step_s": round(clock.stamps[0] - began, 3),
        "steps": finished.steps,
        "whole_s": round(whole, 2),
        **steps,
        "whole_by_steps": round(whole / (finished.steps * steps["median_ms"] / 1e3), 4),
        "saved": len(finished.output),
        "peak_reserved_bytes": peak_reserved(),
        "told": told,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--override", dest="overrides", nargs="*", default=[], metavar="key=value")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        device = device_of(asked.device)
        checkpoint = models.write_checkpoint(folder / "random.safetensors", "sd15", device)
        write_pictures(folder / "pictures", asked.pictures, asked.resolution)
        settings = {
            "base_model": str(checkpoint),
            "train_data_dir": str(folder / "pictures"),
            "output_dir": str(folder / "output"),
            "cache_dir": str(folder / "cache"),
            "output_name": "whole",
            "batch_size": asked.batch,
            "resolution": asked.resolution,
            "device": asked.device,
            "epochs": 100_000,
            "save_steps": asked.steps // 2,
            "log_with": "tensorboard",
            "overwrite": True,
            **parse_overrides(asked.overrides),
        }
        config = build(settings, {"max_train_steps": asked.steps})
        host = host_of(config)
        # It waits for the kernels, which the automatic choice would leave to the next run.
        warm = {"kernels": "triton"} if device.type == "cuda" and "kernels" not in settings else {}
        measure(build(settings, {"max_train_steps": 8, "save_steps": 0, **warm}), host)
        # The file's hash is not known yet, as after loading it.
        host.models._state = (*host.models._state[:2], in_background(checkpoint))
        found = measure(config, host)
    facts = {"what": "whole run", "at": time.strftime("%Y-%m-%d"), "batch": asked.batch, "resolution": asked.resolution}
    print(json.dumps(facts | found | machine()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
