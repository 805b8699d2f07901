"""A LoRA's file, complete in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_trainer.adapters.hashes import legacy_hash, model_hash
from lora_trainer.adapters.writer import serialize

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def assemble(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a .safetensors file whose metadata holds its own hashes, as kohya's trainer computes them."""
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    bare = serialize(tensors, training)
    hashes = {"sshs_model_hash": model_hash(bare), "sshs_legacy_hash": legacy_hash(bare)}
    return serialize(tensors, {**metadata, **hashes})
