"""Previews by the WebUI's own txt2img, with the LoRA of the moment as one of its networks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules import processing, scripts, sd_models, shared
from PIL.Image import Image

from lora_trainer.errors import ModelError
from lora_trainer.files import publish
from lora_trainer.hosts.webui.merged import lora_extension, unmerge
from lora_trainer.sampling import Recipe

# A name that no LoRA of the user's has.
NAME = "lora-trainer-preview-of-the-running-job"


@dataclass(frozen=True)
class Txt2Img:
    """A Painter; only under the queue lock. `drawn` is told after each drawing, as the WebUI has moved its model."""

    folder: Path
    drawn: Callable[[], None]

    def draw(self, lora: bytes, prompts: Sequence[str], recipe: Recipe) -> Iterator[Image]:
        """Raises ModelError where the built-in Lora extension is off."""
        file = self.folder / "samples" / "newest.safetensors"
        publish(lora, file)
        with _known(file), _no_prompt_history():
            for prompt in prompts:
                try:
                    yield from self._pictures(prompt, recipe)
                finally:
                    unmerge(sd_models.model_data.sd_model)
                    self.drawn()

    def _pictures(self, prompt: str, recipe: Recipe) -> list[Image]:
        p = processing.StableDiffusionProcessingTxt2Img(
            sd_model=shared.sd_model,
            prompt=f"{prompt} <lora:{NAME}:1>",
            negative_prompt=recipe.negative,
            seed=recipe.seed,
            steps=recipe.steps,
            cfg_scale=recipe.guidance,
            width=recipe.size[0],
            height=recipe.size[1],
            sampler_name=_preset("Sampling method"),
            scheduler=_preset("Schedule type"),
            do_not_save_samples=True,
            do_not_save_grid=True,
            override_settings={"sd_model_checkpoint": shared.sd_model.sd_checkpoint_info.title},
        )
        # Other extensions stay out, and the conditioning of an earlier step's LoRA too.
        p.scripts, p.script_args = scripts.ScriptRunner(), ()
        p.cached_c, p.cached_uc = [None, None], [None, None]
        try:
            return processing.process_images(p).images[:1]
        finally:
            p.close()


def _preset(label: str) -> str | None:
    """What txt2img shows under `label` after a start: the user's own default, where one was set."""
    try:
        values = json.loads(Path(shared.cmd_opts.ui_config_file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get(f"customscript/sampler.py/txt2img/{label}/value")


@contextmanager
def _known(file: Path) -> Iterator[None]:
    """The Lora extension knows `file` as NAME."""
    networks = lora_extension()
    if networks is None:
        raise ModelError("sample_prompts: the WebUI's built-in Lora extension is off, so it cannot draw with a LoRA")
    tables: list[dict[str, Any]] = [networks.available_networks, networks.available_network_aliases]
    entry = networks.network.NetworkOnDisk(NAME, str(file))
    networks.networks_in_memory.pop(NAME, None)
    for table in tables:
        table[NAME] = entry
    try:
        yield
    finally:
        for table in (*tables, networks.networks_in_memory):
            table.pop(NAME, None)
        if networks.available_network_hash_lookup.get(entry.shorthash) is entry:
            del networks.available_network_hash_lookup[entry.shorthash]


@contextmanager
def _no_prompt_history() -> Iterator[None]:
    """params.txt keeps the user's last prompt."""
    before = shared.cmd_opts.no_prompt_history
    shared.cmd_opts.no_prompt_history = True
    try:
        yield
    finally:
        shared.cmd_opts.no_prompt_history = before
