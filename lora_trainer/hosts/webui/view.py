"""The loaded model as a Model: views that share its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from modules import devices, shared
from torch import Tensor

from lora_trainer.config import Config
from lora_trainer.errors import DataError, ModelError
from lora_trainer.models.bridge import TEXT_PREFIX, text_view, unet_view, vae_view
from lora_trainer.models.families import SD1, detect
from lora_trainer.models.model import CheckpointHashes, Model, ModelFacts
from lora_trainer.models.noise import NoiseSchedule, Prediction
from lora_trainer.models.text import CHUNK, ClipEncoder, Conditions, TextEncoder
from lora_trainer.models.unet_names import LDM_PREFIX as UNET_PREFIX
from lora_trainer.models.vae_names import LDM_PREFIX as VAE_PREFIX

_PREDICTIONS: dict[str, Prediction] = {"eps": "epsilon", "v": "v"}


def state_of(sd_model: Any) -> dict[str, Tensor]:
    """The live tensors under the names that a checkpoint file gives them."""
    parts = (
        (UNET_PREFIX, sd_model.model.diffusion_model),
        (VAE_PREFIX, sd_model.first_stage_model),
        (TEXT_PREFIX, transformer_of(sd_model)),
    )
    # The WebUI wraps the token embedding to put textual inversions in.
    return {
        prefix + name.replace("token_embedding.wrapped.", "token_embedding."): tensor
        for prefix, module in parts
        if module is not None
        for name, tensor in module.state_dict().items()
    }


def view_of(sd_model: Any, config: Config) -> Model:
    """Views of `sd_model` for one segment. Raises ModelError for a model of another family."""
    if any(getattr(sd_model, flag, False) for flag in ("is_sdxl", "is_sd2", "is_sd3")):
        raise ModelError(
            f"{name_of(sd_model)}: inside the WebUI only {SD1.name} is trained so far; SDXL is on the command line "
            "(lora-trainer train)"
        )
    state = state_of(sd_model)
    family = detect({name: tuple(tensor.shape) for name, tensor in state.items()}, name_of(sd_model))
    state = {name: _computable(tensor) for name, tensor in state.items()}
    unet = unet_view(state, num_heads=_heads(sd_model))
    return Model(
        unet=unet,
        text=_text(sd_model, state, config),
        vae=vae_view(state, scale_factor=float(sd_model.scale_factor)),
        noise=NoiseSchedule(
            sd_model.alphas_cumprod_original.float().to(devices.device), _PREDICTIONS[sd_model.parameterization]
        ),
        facts=ModelFacts(
            name=name_of(sd_model),
            family=family,
            device=next(unet.parameters()).device,
            dtype=unet.dtype,
            hashes=_hashes(sd_model),
        ),
    )


def name_of(sd_model: Any) -> str:
    """The checkpoint's file name without its folder."""
    return Path(sd_model.sd_checkpoint_info.filename).name


@dataclass(frozen=True)
class PromptEncoder(TextEncoder):
    """Captions read as prompts: emphasis, textual inversions and BREAK, by the WebUI's own encoder.

    One caption at a time: the "Original" emphasis normalizes over the whole batch. `emphasis` is the WebUI's setting.
    """

    prompt: Any = None
    emphasis: str = "Original"

    def read(self, caption: str) -> Conditions:
        with torch.no_grad(), devices.autocast():
            return Conditions(self.prompt([caption]))

    def tokens(self, caption: str) -> dict[str, Tensor]:
        """Raises DataError for a caption with a textual inversion, whose vectors are no token's."""
        chunks, _ = self.prompt.tokenize_line(caption)
        names = [fix.embedding.name for chunk in chunks for fix in chunk.fixes]
        if names:
            raise DataError(
                f"caption_syntax: the caption {caption!r} names the embedding {names[0]!r}, which has no tokens that a "
                "step could encode (it does with train_text_encoder, and where captions change too often to be encoded "
                "ahead); expected captions without embeddings, or caption_syntax literal"
            )
        return {
            "ids": torch.tensor([chunk.tokens for chunk in chunks]),
            "emphasis": torch.tensor([chunk.multipliers for chunk in chunks]),
        }

    def weigh(self, embedded: Tensor, weights: Tensor) -> Tensor:
        if self.emphasis in ("None", "Ignore"):
            return embedded
        if self.emphasis == "No norm":
            return (embedded * weights.unsqueeze(-1)).to(embedded.dtype)
        return super().weigh(embedded, weights)


def _text(sd_model: Any, state: dict[str, Tensor], config: Config) -> TextEncoder:
    encoder = sd_model.cond_stage_model
    transformer = transformer_of(sd_model)
    skip = config.clip_skip or int(shared.opts.CLIP_stop_at_last_layers)
    view = (ClipEncoder(text_view(state, config=transformer.config), skip),)
    if config.caption_syntax == "literal":
        return TextEncoder(_literal(encoder), view)
    return PromptEncoder(_literal(encoder), view, encoder, shared.opts.emphasis)


def _literal(encoder: Any) -> Callable[[str], Tensor]:
    """The host's tokenizer, in chunks of 75, with nothing of the prompt's syntax."""

    def tokenize(caption: str) -> Tensor:
        (ids,) = encoder.tokenize([caption])
        chunks = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)] or [[]]
        framed = [[encoder.id_start, *chunk] + [encoder.id_end] * (CHUNK + 1 - len(chunk)) for chunk in chunks]
        return torch.tensor(framed)

    return tokenize


def transformer_of(sd_model: Any) -> Any:
    """SD1's text encoder; None in a model of another family."""
    encoder = getattr(sd_model, "cond_stage_model", None)
    return getattr(getattr(encoder, "wrapped", None), "transformer", None)


def _heads(sd_model: Any) -> int:
    """Shapes do not tell the number of heads."""
    modules = sd_model.model.diffusion_model.named_modules()
    return next((module.heads for name, module in modules if name.endswith("attn1")), 8)


def _computable(tensor: Tensor) -> Tensor:
    """8-bit storage cannot be computed with: the only case in which a copy is made."""
    return tensor.half() if "float8" in str(tensor.dtype) else tensor


def _hashes(sd_model: Any) -> Callable[[], CheckpointHashes]:
    """The WebUI knows both, and keeps the long one in its cache; without --no-hashing it is computed when asked for."""
    info = sd_model.sd_checkpoint_info

    def hashes() -> CheckpointHashes:
        if not info.sha256:
            info.calculate_shorthash()
        return CheckpointHashes(info.hash, info.sha256)

    return hashes
