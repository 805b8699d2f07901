"""What a run leaves behind: LoRA files with their metadata, the effective config, previews."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from lora_trainer.adapters.metadata import BaseFacts, DataFacts, Folder, RunFacts, build_metadata
from lora_trainer.adapters.naming import to_diffusers
from lora_trainer.adapters.parts import parts_of
from lora_trainer.adapters.save import PRECISIONS, assemble
from lora_trainer.config import Config, trigger_words_of
from lora_trainer.config.export import to_header, to_yaml
from lora_trainer.dataset.grouping import by_folder
from lora_trainer.dataset.samples import Prepared
from lora_trainer.errors import OutputError
from lora_trainer.events import EventSink, Notice, Saved, Saving
from lora_trainer.events import Progress as Working
from lora_trainer.hosts.ports import LoraStore, Painter
from lora_trainer.models.model import Model
from lora_trainer.sampling import Recipe, generate
from lora_trainer.training import randomness
from lora_trainer.training.described import kohya_settings, storage_settings
from lora_trainer.training.initial import NOTHING, Start
from lora_trainer.training.noising import timesteps_of
from lora_trainer.training.rescue import rescued
from lora_trainer.training.segment import Segment, State

# The tensors of each kind of adapter that are zero before the first step.
BEGIN_AT_ZERO = re.compile(r".+\.(?:lora_up\.weight|lora_B\.weight|hada_w2_b|lokr_w2(?:_b)?|oft_blocks)|[^.]+\.weight")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int
    steps_per_epoch: int
    batches_per_epoch: int


@dataclass(frozen=True)
class Output:
    """The files of one run, under a claimed `name`, that began with `start`."""

    config: Config
    store: LoraStore
    sink: EventSink
    name: str
    started_at: float
    clock: Callable[[], float]
    painter: Painter | None = None
    start: Start = NOTHING

    def save(
        self, segment: Segment, data: Prepared, progress: Progress, *, final: bool, weights: State | None = None
    ) -> list[Path]:
        """Publish the LoRA as it is now, or was with `weights` at the step of `progress`; a final one with its config
        beside it. Raises OutputError."""
        with segment.settled(weights):
            return self._save(segment, data, progress, final=final)

    def save_between(self, segment: Segment, data: Prepared, progress: Progress) -> None:
        """An intermediate file; a run is not lost because one of them could not be written."""
        try:
            self.save(segment, data, progress, final=False)
        except OutputError as error:
            self.sink(Notice(text=f"step {progress.step} is not saved, training goes on: {error}", level="warning"))

    def _save(self, segment: Segment, data: Prepared, progress: Progress, *, final: bool) -> list[Path]:
        stem = self.name if final else self.stem(progress.step)
        self.sink(Saving(step=progress.step))
        metadata = self._metadata(segment.model, data, progress)
        files: list[tuple[str, dict[str, Tensor]]] = []
        if self.config.output_format in ("webui", "both"):
            files.append((f"{stem}.safetensors", _kohya(segment)))
        if self.config.output_format in ("diffusers", "both"):
            files.append((DIFFUSERS_FILE if final else f"{stem}/{DIFFUSERS_FILE}", _diffusers(segment)))
        paths = []
        for file, tensors in files:
            refuse_nonsense(file, tensors)
            paths.append(self._publish(file, assemble(self._rounded(tensors), metadata), final=final))
            self.sink(Saved(path=str(paths[-1]), step=progress.step, kind="lora" if final else "checkpoint"))
        if final:
            self._keep_settings(stem)
        return paths

    def stem(self, step: int) -> str:
        """The name of an intermediate file."""
        return f"{self.name}-step{step:08}"

    def _keep_settings(self, stem: str) -> None:
        """Beside the LoRA, whose header holds them too: a run does not fail because of them."""
        try:
            self.store.publish(f"{stem}.yaml", to_yaml(self.config).encode(), final=True)
        except OutputError as error:
            self.sink(Notice(text=f"the LoRA is saved, a copy of its settings is not: {error}", level="warning"))

    def _publish(self, file: str, data: bytes, *, final: bool) -> Path:
        try:
            return self.store.publish(file, data, final=final)
        except OutputError as error:
            raise (rescued(file, data, error) if final else error) from error.__cause__

    def preview(self, segment: Segment, step: int, weights: State | None = None) -> None:
        """Draw the sample prompts with the LoRA as it is now, or was with `weights` at `step`. A run is not lost
        because a picture does not fit beside it. Raises OutputError."""
        try:
            self._preview(segment, step, weights)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.sink(Notice(text=f"step {step}: no preview, it does not fit into the memory", level="warning"))

    def _preview(self, segment: Segment, step: int, weights: State | None) -> None:
        config = self.config
        if not config.sample_prompts:
            return
        size = config.resolution or segment.model.facts.family.resolution
        recipe = Recipe(
            (size, size), config.sample_steps, config.sample_guidance, config.sample_negative_prompt, config.seed
        )
        with segment.settled(weights):
            self._publish_pictures(self._drawn(segment, recipe), step)

    def _publish_pictures(self, pictures: Iterator[Image], step: int) -> None:
        for number, picture in enumerate(pictures, start=1):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            file = f"samples/{self.name}-step{step:08}-{number}.png"
            path = self.store.publish(file, buffer.getvalue(), final=False)
            self.sink(Working(stage="drawing", done=number, total=len(self.config.sample_prompts)))
            self.sink(Saved(path=str(path), step=step, kind="sample"))

    def _drawn(self, segment: Segment, recipe: Recipe) -> Iterator[Image]:
        """A picture a sample prompt: by the host's own painter, with the LoRA as it would be saved, or by ours."""
        if self.painter is None:
            for prompt in self.config.sample_prompts:
                yield from generate(segment.model, [prompt], recipe, segment.network.precision)
            return
        lora = assemble(self._rounded(_kohya(segment)), {})
        yield from self.painter.draw(lora, self.config.sample_prompts, recipe)

    def _rounded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights in the file's precision, or in fp32 where that cannot hold them; alphas stay fp32 scalars, and DoRA's
        few scales stay fp32 too, since they multiply the base's weights."""
        dtype = PRECISIONS[self.config.save_precision]
        exact = {name for name, tensor in tensors.items() if tensor.dim() == 0 or name.endswith(".dora_scale")}
        rounded = {name: tensor if name in exact else tensor.to(dtype) for name, tensor in tensors.items()}
        if all(torch.isfinite(tensor).all() for tensor in rounded.values()):
            return rounded
        text = f"some weights are too large for {self.config.save_precision}: the file is in fp32"
        self.sink(Notice(text=text, level="warning"))
        return tensors

    def _metadata(self, model: Model, data: Prepared, progress: Progress) -> dict[str, str]:
        facts = model.facts
        plain = data.rules.plain
        items = dict.fromkeys(sample.item for sample in data.samples)
        # Of regularisation pictures an epoch may see some once more than others.
        folders, others = (
            {
                name: Folder([plain(item.caption) for item in group], min(item.repeats for item in group))
                for name, group in by_folder([item for item in items if item.prior == prior]).items()
            }
            for prior in (False, True)
        )
        hashes = facts.hashes()
        base = BaseFacts(
            name=facts.name,
            version=facts.family.base_version,
            architecture=facts.family.architecture,
            prediction=model.noise.prediction,
            legacy_hash=hashes.legacy,
            sha256=hashes.sha256,
        )
        resolution = self.config.resolution or facts.family.resolution
        skip = model.text.clip_skip if facts.family.clip_skip else 1
        run = RunFacts(
            name=self.name,
            session_id=randomness.key(self.config.seed, f"session {self.name} {self.started_at}") >> 31,
            started_at=self.started_at,
            finished_at=self.clock(),
            steps=progress.step,
            epoch=-(-progress.step // progress.steps_per_epoch),
            trigger_words=trigger_words_of(self.config),
            config_json=to_header(self.config),
            timesteps=timesteps_of(self.config, model.noise),
            initial=self.start.origin,
            settings={
                **kohya_settings(self.config),
                **storage_settings(model.unet),
                "clip_skip": skip if skip > 1 else None,
            },
        )
        facts = DataFacts(folders, data.buckets, resolution, progress.batches_per_epoch, others)
        return build_metadata(run, facts, base)


def _kohya(segment: Segment) -> dict[str, Tensor]:
    """What is learned, in the WebUI's form."""
    parts, learned = parts_of(segment.model), segment.factors()
    return {name: t for part, factors in learned.items() for name, t in parts[part].to_kohya(factors).items()}


def _diffusers(segment: Segment) -> dict[str, Tensor]:
    parts = [to_diffusers(factors, part) for part, factors in segment.factors().items()]
    return {name: tensor for part in parts for name, tensor in part.items()}


def refuse_nonsense(file: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises OutputError for weights that are not finite, or of which nothing was learned."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise OutputError(
            f"{file}: not written: {len(broken)} of its {len(tensors)} tensors are not finite ({broken[0]}). Train "
            "again with a lower learning_rate, or with mixed_precision bf16 or no"
        )
    ups = [tensor for name, tensor in tensors.items() if BEGIN_AT_ZERO.fullmatch(name)]
    if not any(up.any() for up in ups):
        raise OutputError(
            f"{file}: not written: nothing was learned, all of its {len(ups)} modules are still zero. Train longer, or "
            "with a higher learning_rate"
        )
