"""How far other prompts move while a style is learned: prior and output preservation beside a plain run, on the bundled
world.

usage: python -m benchmarks.drift [key=value …] [--runs plain prior output] [--held-out 16] [--every 15] >> RESULTS
       python -m benchmarks.drift --table RESULTS

Prints one line of JSON a saved step: the held-out loss of the style, and the drift: the mean squared difference between
the base's predictions and the LoRA's on Noto's pictures under captions of styles that the base knows, with fixed noise
and timesteps. The regularisation pictures are Noto's too, of other subjects. The table has how much less the others
drift than the plain run of the same seed did where its held-out loss was the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.plot import Line, read
from lora_trainer.config import Config
from lora_trainer.config.sources import parse_overrides
from lora_trainer.dataset.samples import Sample
from lora_trainer.demo import WORLD, demo_config
from lora_trainer.hosts.standalone import open_model, train
from lora_trainer.sampling import apply_lora
from lora_trainer.training import data
from lora_trainer.training.data import Items
from lora_trainer.training.dropout import LoraDropout, Shares
from lora_trainer.training.objectives import mse
from lora_trainer.training.precision import Precision
from lora_trainer.training.settings import torch_settings
from lora_trainer.training.step import Network
from lora_trainer.training.validation import Validator

STYLE, CLASS, OTHERS = "twemoji", "noto", ("noto", "fluent", "flat")
RUNS: Mapping[str, Mapping[str, object]] = {
    "plain": {},
    "prior": {"prior_loss_weight": 1.0},
    "output": {"preservation_weight": 1.0, "preservation_prompt": CLASS},
}
CPU = torch.device("cpu")


def noto(out: Path, first: int, last: int, style: str) -> Path:
    """Noto's pictures from `first` to `last`, captioned as pictures of `style`."""
    out.mkdir(parents=True)
    rows = (WORLD / "placebo" / "metadata.csv").read_text(encoding="utf-8").splitlines()[first:last]
    for row in rows:
        shutil.copy(WORLD / "placebo" / row.split(",")[0], out)
    (out / "metadata.csv").write_text("\n".join(rows).replace(f'"{STYLE} ', f'"{style} '), encoding="utf-8")
    return out


def samples_of(config: Config, folders: Sequence[Path], count: int) -> list[Sample]:
    """`count` pictures of each folder, encoded."""
    model, found = open_model(Path(config.base_model), CPU), []
    for folder in folders:
        plain = demo_config(Path(config.output_dir), train_data_dir=str(folder), metadata_path=None)
        items = data.find(plain, lambda event: None).train[:count]
        found += data.load(Items(items, ()), plain, model, sink=lambda event: None).train.samples
    return found


def network_of(config: Config, lora: Path | None) -> Network:
    model = open_model(Path(config.base_model), CPU)
    if lora is not None:
        apply_lora(model, lora)
    return Network(model.unet, model.noise, mse, Precision(CPU, torch.float32), LoraDropout({}, Shares()))


def predictions(network: Network, samples: Sequence[Sample]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([network.predicted(batch) for batch in Validator(samples).batches(network.noise.timesteps)])


def drift_at(held_out: float, plain: Sequence[Line]) -> float | None:
    """The plain run's drift where its held-out loss first was as low, between two measurements in proportion; None
    where it never was."""
    for before, now in pairwise(plain):
        if now["held_out"] <= held_out:
            part = (before["held_out"] - held_out) / (before["held_out"] - now["held_out"])
            return before["drift"] + part * (now["drift"] - before["drift"])
    return None


def rows(lines: Sequence[Line]) -> Iterator[str]:
    """A row for each preserved run, in Markdown: its last step to which the plain run has an equal, and the range of
    what is saved at the other ones."""
    yield "| run | seed | held-out loss | drift, plain | preserved | less | less at other steps |"
    yield "|---|---|---|---|---|---|---|"
    of: dict[tuple[str, int], list[Line]] = {}
    for line in lines:
        of.setdefault((line["run"], line["seed"]), []).append(line)
    for (run, seed), kept in sorted(of.items()):
        plain = [*of["base", seed][:1], *of["plain", seed]]
        pairs = [(line, drift_at(line["held_out"], plain)) for line in kept if run in ("prior", "output")]
        equal = [(line, drift) for line, drift in pairs if drift]
        if equal:
            less = [1 - line["drift"] / drift for line, drift in equal]
            (line, drift), others = equal[-1], less[:-1]
            yield (
                f"| {run} | {seed} | {line['held_out']:.4f} | {drift:.4f} | {line['drift']:.4f} | {less[-1]:.0%} | "
                + (f"{min(others):.0%} to {max(others):.0%} |" if others else "|")
            )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--held-out", type=int, default=16, help="pictures of each kind to measure with")
    parser.add_argument("--every", type=int, default=15, help="steps between two measurements")
    parser.add_argument("--table", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    given = parser.parse_args(arguments)
    if given.table:
        print("\n".join(rows(read([given.table]))))
        return
    with tempfile.TemporaryDirectory() as out:
        _measure(given, Path(out))


def _measure(given: argparse.Namespace, out: Path) -> None:
    shared = {"trigger_words": STYLE, "validation_data_dir": None, "save_steps": given.every, "cpu_threads": 1}
    shared |= parse_overrides(given.settings)
    config = demo_config(out, **shared)
    others = [noto(out / f"seen-{style}", 60, 120, style) for style in OTHERS]
    with torch_settings(1):
        style = samples_of(config, [WORLD / "twemoji-held-out"], given.held_out)
        seen = samples_of(config, others, given.held_out)
        base = network_of(config, None)
        told = {"seed": config.seed, "run": "base", "held_out": Validator(style).loss(base), "drift": 0.0}
        print(json.dumps(told), flush=True)
        before = predictions(base, seen)
    regular = noto(out / "regular", 0, 60, CLASS)
    for run in given.runs:
        extra = {"reg_data_dir": str(regular)} if run == "prior" else {}
        config = demo_config(out / run, **shared, **RUNS[run], **extra, output_name="lora")
        train(config, lambda event: None)
        for lora in sorted((out / run).glob("lora*.safetensors")):
            with torch_settings(1):
                network = network_of(config, lora)
                drift = (predictions(network, seen) - before).square().mean().item()
                told = {
                    "seed": config.seed,
                    "run": run,
                    "file": lora.stem,
                    "held_out": Validator(style).loss(network),
                    "drift": drift,
                }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
