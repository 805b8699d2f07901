"""One declaration of every setting, and the ways in and out of it."""

from lora_trainer.config.build import build, output_name_of, replace, trigger_words_of, words_of
from lora_trainer.config.schema import Concept, Config

__all__ = ["Concept", "Config", "build", "output_name_of", "replace", "trigger_words_of", "words_of"]
