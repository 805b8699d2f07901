"""Captioners of transformers: BLIP, BLIP-2, GIT and vision encoders with a text decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from lora_trainer.captioning.words import Words
from lora_trainer.errors import ConfigError, ModelError, printable

# Those that say what a picture shows without being asked a question.
KINDS = ("blip", "blip-2", "git", "vision-encoder-decoder")
BEAMS, MAX_NEW_TOKENS = 3, 50


class Sentences:
    """A sentence for each picture, by beam search, the same each time.

    `device` is auto (the first GPU, else the CPU) or torch's name; fp16 on a GPU, fp32 on the CPU. Only
    .safetensors weights are read, and no code of the folder's is run. Raises ModelError for a folder that does not
    hold such a captioner.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self._folder, self._device_name = folder, device
        self.name = folder.resolve().name
        self._class_name = _class_name(folder)
        self._parts: tuple[Any, Any, Any] | None = None

    def caption(self, image: Image.Image) -> Words:
        """Raises ConfigError for a device that is not there, ModelError for weights that cannot be loaded."""
        import torch

        self._parts = self._parts or self._load()
        model, processor, tokenizer = self._parts
        device = self._device()
        model.to(device)
        pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(device, model.dtype)
        with torch.inference_mode():
            ids = model.generate(pixel_values=pixels, num_beams=BEAMS, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return Words(sentence=tokenizer.decode(ids[0], skip_special_tokens=True).strip())

    def rest(self) -> None:
        """The model waits in main memory."""
        if self._parts is not None and self._parts[0].device.type != "cpu":
            import torch

            self._parts[0].to("cpu")
            torch.cuda.empty_cache()

    def _device(self) -> Any:
        import torch

        name = self._device_name
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError([f"device: expected auto, cpu, cuda or cuda:1, found {name}"]) from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError([f"device: expected one of {torch.cuda.device_count()} CUDA devices, found {name}"])
        return device

    def _load(self) -> tuple[Any, Any, Any]:
        """(model, image processor, tokenizer)."""
        import torch
        import transformers

        dtype = torch.float32 if self._device().type == "cpu" else torch.float16
        try:
            kind = getattr(transformers, self._class_name)
            model = kind.from_pretrained(self._folder, local_files_only=True, use_safetensors=True)
            processor = transformers.AutoImageProcessor.from_pretrained(self._folder, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        except Exception as error:
            # Damaged and missing files raise nearly anything.
            raise ModelError(f"{self._folder}: not a captioner that transformers loads: {_line(error)}") from error
        return model.to(dtype).eval(), processor, tokenizer


def _class_name(folder: Path) -> str:
    """The model's class in transformers. Raises ModelError."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, (name, *_) = config["model_type"], config["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{file}: expected model_type and architectures of a transformers model, found none") from None
    if kind not in KINDS:
        raise ModelError(f"{file}: expected a captioner ({', '.join(KINDS)}), found {printable(str(kind), 100)}")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: expected weights as .safetensors, found none; a .bin may run code when it is read")
    return str(name)


def _line(error: Exception) -> str:
    return printable((str(error) or type(error).__name__).splitlines()[0], 300)
