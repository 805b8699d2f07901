"""kohya's sd-scripts, run for real on a random checkpoint and random pictures.

    KOHYA_DIR=~/sd-scripts KOHYA_PYTHON=~/sd-scripts/venv/bin/python python -m benchmarks.kohya --batch 4

prints one line of JSON. See README.md for its keys and for the environment variables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import timing
from benchmarks.models import SEED, Family, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "lora_trainer" / "models" / "clip"
SCRIPTS = {"sd15": "train_network.py", "sdxl": "sdxl_train_network.py"}
# Where kohya looks for tokenizers before it asks a model hub, and what each pads with.
TOKENIZERS = {
    "openai_clip-vit-large-patch14": "<|endoftext|>",
    "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": "!",
}
PICTURES, REPEATS = 16, 100
PROFILED = 5


@dataclass(frozen=True)
class Run:
    """One run of kohya. `steps` are counted, after `warmup` ones; `device` cpu is only good for trying the code.

    `workers`: processes that load data, kohya's default. `folder`: where the checkpoint, the pictures and kohya's
    output go; it is kept and used again.
    """

    family: Family = "sd15"
    batch: int = 1
    resolution: int = 512
    dropout: float = 0.0
    checkpointing: bool = False
    train_text_encoder: bool = False
    steps: int = 100
    warmup: int = 15
    workers: int = 8
    precision: str = "fp16"
    device: str = "cuda"
    folder: str = str(Path(tempfile.gettempdir()) / "lora-trainer-kohya")

    @property
    def profiled(self) -> int:
        """Steps at the end that are profiled and not timed."""
        return 0 if self.device == "cpu" else PROFILED


def measure(run: Run) -> dict[str, Any]:
    """Prepare the folder, run kohya in it and read what the probe saw.

    Raises CalledProcessError, kohya's own log being on standard error, when it fails.
    """
    folder = Path(run.folder)
    checkpoint = prepare(run, folder)
    record = folder / "record.json"
    shutil.rmtree(folder / "output", ignore_errors=True)
    record.unlink(missing_ok=True)
    kohya = Path(os.environ["KOHYA_DIR"]).resolve()
    python = os.environ.get("KOHYA_PYTHON", sys.executable)
    command = [python, "-m", "benchmarks.kohya_probe", str(record), str(run.profiled), SCRIPTS[run.family]]
    started = time.time()
    subprocess.run(
        [*command, *arguments(run, folder, checkpoint)], cwd=kohya, env=environment(), stdout=sys.stderr, check=True
    )
    seen = json.loads(record.read_text())
    times = timing.gaps(seen.pop("stamps"))[run.warmup :]
    first = {"first_step_s": round(seen.pop("first_at") - started, 3)}
    return timing.spread(times) | first | seen | _health(folder / "output" / "bench.safetensors")


def prepare(run: Run, folder: Path) -> Path:
    """Everything a run reads, made where it is missing. Returns the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizers(folder / "tokenizers")
    _pictures(_data(run, folder) / f"{REPEATS}_pictures", run.resolution)
    checkpoint = folder / f"random-{run.family}.safetensors"
    if not checkpoint.exists():
        partial = checkpoint.with_suffix(".partial")
        write_checkpoint(partial, run.family, run.device)
        partial.rename(checkpoint)
    return checkpoint


def arguments(run: Run, folder: Path, checkpoint: Path) -> list[str]:
    """kohya's command line for the same LoRA as the other benchmarks'.

    SD1's script knows no cache of text embeddings: there, the frozen text encoder runs at every step.
    """
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": checkpoint,
        "tokenizer_cache_dir": folder / "tokenizers",
        "train_data_dir": _data(run, folder),
        "caption_extension": ".txt",
        "resolution": f"{run.resolution},{run.resolution}",
        "output_dir": folder / "output",
        "output_name": "bench",
        "network_module": "networks.lora",
        "network_dim": 8,
        "network_alpha": 16,
        "optimizer_type": "AdamW",
        "learning_rate": 2e-4,
        "lr_scheduler": "constant",
        "train_batch_size": run.batch,
        # The first step is no gap between two.
        "max_train_steps": 1 + run.warmup + run.steps + run.profiled,
        "mixed_precision": run.precision,
        "seed": SEED,
        "max_data_loader_n_workers": run.workers,
    }
    if run.dropout > 0:
        options["network_dropout"] = run.dropout
    switches = {
        "cache_latents": True,
        "sdpa": True,
        "persistent_data_loader_workers": run.workers > 0,
        "network_train_unet_only": not run.train_text_encoder,
        "gradient_checkpointing": run.checkpointing,
        "cache_text_encoder_outputs": run.family == "sdxl",
        "no_half_vae": run.family == "sdxl",
    }
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return flags + [f"--{key}" for key, on in switches.items() if on]


def environment() -> dict[str, str]:
    """The environment of kohya's process: its packages, then the probe; nothing is asked of the network."""
    packages = [os.environ.get("KOHYA_PYTHONPATH"), str(ROOT)]
    offline = {"HF_HUB_OFFLINE": "1", "USE_FLAX": "0", "USE_JAX": "0", "USE_TF": "0"}
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, packages))} | offline


def _health(lora: Path) -> dict[str, Any]:
    """Whether it was training at all, as in `benchmarks.reference`, read from the LoRA that kohya saved."""
    state = load_file(lora)
    ups = [tensor for name, tensor in state.items() if name.endswith(".lora_up.weight")]
    return {
        "modules": len(ups),
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in state.values()),
        "moved": all(bool(up.abs().max() > 0) for up in ups),
    }


def _data(run: Run, folder: Path) -> Path:
    return folder / f"pictures-{run.resolution}"


def _pictures(folder: Path, size: int) -> None:
    if folder.exists():
        return
    folder.mkdir(parents=True)
    generator = np.random.default_rng(SEED)
    for number in range(PICTURES):
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png", compress_level=1)
        (folder / f"{number:02}.txt").write_text(f"a photo of picture number {number}, made of noise")


def _tokenizers(folder: Path) -> None:
    for name, pad in TOKENIZERS.items():
        place = folder / name
        if place.exists():
            continue
        shutil.copytree(CLIP, place)
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            settings = json.loads((place / file).read_text())
            (place / file).write_text(json.dumps(settings | {"pad_token": pad}))


def main() -> None:
    """Run kohya once and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Run):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    run = Run(**vars(parser.parse_args()))
    if "KOHYA_DIR" not in os.environ:
        parser.error("set KOHYA_DIR to the folder of kohya's train_network.py")
    print(json.dumps({"what": "kohya", **asdict(run), **measure(run)}))


if __name__ == "__main__":
    main()
