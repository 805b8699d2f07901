"""Settings that do not suit a model's family: refused by name before anything is encoded."""

from __future__ import annotations

from collections.abc import Iterator

from lora_trainer.config import Config
from lora_trainer.config.adapting_rules import BLOCKS
from lora_trainer.config.rules import WEIGHTS
from lora_trainer.errors import ConfigError
from lora_trainer.models.families import Family

# Weights of timesteps by a diffusion's signal and noise, and noise that makes up for schedules that never end in it: a
# flow weighs its timesteps by how often they are drawn (arXiv:2403.03206, section 3.1), and ends in plain noise.
DIFFUSION = (*WEIGHTS, "zero_terminal_snr", "noise_offset", "multires_noise_iterations")


def require_suited(config: Config, family: Family) -> None:
    """Raises ConfigError with all of them."""
    flow = _flow(config, family) if family.prediction == "flow" else ()
    transformer = _transformer(config, family) if family.network == "mmdit" else ()
    if found := [*flow, *transformer]:
        raise ConfigError(found)


def _flow(config: Config, family: Family) -> Iterator[str]:
    for key in DIFFUSION:
        if value := getattr(config, key):
            off = "false" if value is True else "0"
            yield f"{key}: expected {off}, since {family.name} learns a flow, not a diffusion, found {value}"
    if config.loss_type in ("huber", "smooth_l1") and config.huber_schedule == "snr":
        yield f"huber_schedule: expected constant or exponential, since {family.name} learns a flow, found snr"


def _transformer(config: Config, family: Family) -> Iterator[str]:
    if config.adapter != "lora":
        yield f"adapter: expected lora, the only kind that the WebUI loads on {family.name}, found {config.adapter}"
    if config.train_text_encoder:
        yield (
            f"train_text_encoder: expected false, since the WebUI loads no LoRA of {family.name}'s text encoders under "
            "the names that trainers give them, found true"
        )
    for key in (*BLOCKS, "conv_rank"):
        if value := getattr(config, key):
            yield f"{key}: expected nothing, since {family.name} has no UNet's blocks, found {value}"
    if config.output_format != "webui":
        yield (
            f"output_format: expected webui, since diffusers calls {family.name}'s modules otherwise, found "
            f"{config.output_format}"
        )
    if config.measure_drift:
        yield f"measure_drift: expected false, since it compares what UNets see and {family.name} has none, found true"
