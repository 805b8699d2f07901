"""One declaration of every setting, and the ways in and out of it."""

from lora_trainer.config.build import build, output_name_of, replace
from lora_trainer.config.schema import Config

__all__ = ["Config", "build", "output_name_of", "replace"]
