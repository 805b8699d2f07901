"""What a base in fewer bits costs in learning: the bundled world's style on each base_precision, seed by seed.

usage: python -m benchmarks.stored [key=value ...]

Settings of a run, as max_train_steps=100 (the default here). Prints a row a base_precision: how far the loss of each
step is from that on the base as it computes (the same pictures, noise and timesteps), on average and at most; and the
held-out loss before and after. What does not work on this machine is left out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from lora_trainer.config.sources import parse_overrides
from lora_trainer.demo import demo_config
from lora_trainer.errors import ConfigError
from lora_trainer.events import AnyEvent, Finished, StepDone
from lora_trainer.hosts.standalone import train
from lora_trainer.models.storage import AUTO, STORAGES

SETTINGS = {"max_train_steps": 100, "gradient_accumulation_steps": 1, "checkpoint_every": 0, "save_steps": 0}


def run_on(storage: str, folder: Path, settings: dict[str, object]) -> tuple[list[float], Finished]:
    """The losses of the steps, and what the run came to. Raises ConfigError where `storage` does not work here."""
    losses: list[float] = []

    def sink(event: AnyEvent) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)

    place = {"base_precision": storage, "cache_dir": str(folder / "cache"), "log_with": "csv"}
    return losses, train(demo_config(folder / storage, **SETTINGS | settings | place), sink)


def main(arguments: list[str]) -> None:
    settings = parse_overrides(arguments)
    plain: list[float] = []
    print("| base_precision | loss apart, mean | at most | held out, base | held out, with the LoRA |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as home:
        for storage in (AUTO, *STORAGES):
            try:
                losses, finished = run_on(storage, Path(home), settings)
            except ConfigError as error:
                print(error, file=sys.stderr)
                continue
            plain = plain or losses
            apart = [abs(one - other) / other for one, other in zip(losses, plain, strict=True)]
            print(
                f"| {storage} | {sum(apart) / len(apart):.2%} | {max(apart):.2%} | {finished.validation_base:.4f} | "
                f"{finished.validation_lora:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
