"""What a CLIP model that the user has says of drawn pictures: CLIP-I and CLIP-T of DreamBooth (Ruiz et al. 2023,
arXiv:2208.12242). Nothing is ever downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import normalize

from lora_trainer.errors import ModelError, printable

# Pictures at once.
BATCH = 8
Weights = Mapping[str, Tensor]


class Scores(NamedTuple):
    """Mean cosine similarities, at most 1: of pictures to training pictures, and of each to its prompt."""

    image: float
    text: float


@dataclass
class Clip:
    """A CLIPModel of transformers with its image processor and its tokenizer, in `folder`. It stays in main memory, for
    a GPU in half precision, and each use has a copy on the device. Raises ModelError for a folder that seems to hold
    none."""

    folder: Path
    _parts: tuple[Any, Any, Any] | None = field(default=None, init=False)
    _real: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        file = self.folder / "config.json"
        try:
            kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ModelError(
                f"clip_model_dir: {file}: expected that of a CLIP model of transformers, found none"
            ) from None
        if kind != "clip":
            raise ModelError(f"clip_model_dir: {file}: expected model_type clip, found {printable(str(kind), 100)}")
        if not list(self.folder.glob("*.safetensors")):
            raise ModelError(
                f"clip_model_dir: {self.folder}: expected weights as .safetensors, found none; a .bin may run code "
                "when it is read"
            )

    @property
    def remembers(self) -> bool:
        return self._real is not None

    def remember(self, pictures: Iterable[Image.Image], device: torch.device) -> None:
        """The training pictures that others are held against. Raises ModelError for weights that cannot be loaded."""
        self._parts = self._parts or self._load(torch.float16 if device.type == "cuda" else torch.float32)
        weights = self._copied(device)
        self._real = torch.cat([self._seen(batch, [""], weights)[0] for batch in _batches(pictures)])

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str], device: torch.device) -> Scores:
        """Of as many pictures as prompts, after `remember`."""
        seen, said = self._seen(pictures, prompts, self._copied(device))
        return Scores((seen @ self._real.T).mean().item(), (seen * said).sum(dim=1).mean().item())

    def _copied(self, device: torch.device) -> Weights:
        """Nothing need come back."""
        model = self._parts[0]
        return {name: tensor.to(device) for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    @torch.no_grad()
    def _seen(self, pictures: Sequence[Image.Image], prompts: Sequence[str], weights: Weights) -> tuple[Tensor, Tensor]:
        """Embeddings of length 1, float32 on the CPU: [pictures, D] and [prompts, D]."""
        model, processor, tokenizer = self._parts
        device = next(iter(weights.values())).device
        pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        most = model.config.text_config.max_position_embeddings
        words = tokenizer(list(prompts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        given = {name: words[name].to(device) for name in ("input_ids", "attention_mask")}
        given["pixel_values"] = pixels.to(device, model.dtype)
        out = functional_call(model, weights, (), given)
        return normalize(out.image_embeds.float()).cpu(), normalize(out.text_embeds.float()).cpu()

    def _load(self, dtype: torch.dtype) -> tuple[Any, Any, Any]:
        import transformers

        here = {"local_files_only": True}
        try:
            model, told = transformers.CLIPModel.from_pretrained(
                self.folder, use_safetensors=True, output_loading_info=True, **here
            )
            processor = transformers.CLIPImageProcessor.from_pretrained(self.folder, **here)
            tokenizer = transformers.CLIPTokenizer.from_pretrained(self.folder, **here)
        except Exception as error:
            # Damaged and missing files raise nearly anything.
            why = printable((str(error) or type(error).__name__).splitlines()[0], 300)
            raise ModelError(
                f"clip_model_dir: {self.folder}: not a CLIP model that transformers loads: {why}"
            ) from error
        # Else they would be random numbers.
        missing = sorted(name for name in told["missing_keys"] if not name.endswith("position_ids"))
        if missing:
            raise ModelError(
                f"clip_model_dir: {self.folder}: expected the weights of a CLIP model, {len(missing)} are missing, for "
                f"example {missing[0]}"
            )
        return model.to(dtype).eval(), processor, tokenizer


def _batches(pictures: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    batch: list[Image.Image] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
