"""What is trained: which modules of which network, how large, and how fast beside the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from diffusers import UNet2DConditionModel
from torch import nn

from lora_trainer.adapters.inject import Size
from lora_trainer.adapters.kinds import KINDS
from lora_trainer.adapters.naming import text_name
from lora_trainer.adapters.parts import layer_name, ldm_names
from lora_trainer.adapters.targets import block_of, filtered, select, select_text
from lora_trainer.config import Config
from lora_trainer.config.adapting_rules import BLOCKS, ONE_RATE, WITHOUT_PRODUCT
from lora_trainer.config.blocks import block_values, ranks, value_of
from lora_trainer.errors import ConfigError
from lora_trainer.models.mmdit import MMDiT
from lora_trainer.models.text import ClipEncoder

# Fewer steps are said to be few; so many were best for few pictures of one thing, of the 320 that were tried.
FEW_STEPS, GOOD_STEPS = 100, 160
# Where IA³ scales the inputs, which are a feed-forward layer's inner values.
ON_INPUT = ("ff.net.2", "mlp.fc2")
# What is said of kinds whose sizes are no LoRA's.
SAID = {
    "ia3": "one number a channel is learned, which wants a learning_rate of 5e-3 or more; lora_rank and lora_alpha do "
    "nothing; A1111 applies it, Forge and reForge do not",
    "oft": "lora_rank is the size of its blocks, lora_alpha does nothing; A1111 and reForge apply it, Forge does not",
}


def unet_sizes(config: Config, unet: UNet2DConditionModel | MMDiT) -> dict[str, Size]:
    """Of each module of the UNet that is trained, in the network's order. Raises ConfigError."""
    targets = [*config.target_modules, *(["conv"] if config.conv_rank else [])]
    names = _filtered(config, select(unet, targets), "the UNet")
    ldm = ldm_names(unet)
    blocks = {name: block_of(ldm(name)) for name in names}
    _known_blocks(config, {block_of(ldm(name)) for name, module in unet.named_modules() if _has_weights(module)})
    rank_of, alpha_in, rate_of = ranks(config.block_ranks), *map(block_values, (config.block_alphas, config.block_lrs))
    sizes = {}
    for name, block in blocks.items():
        rank, alpha = int(value_of(rank_of, block, config.lora_rank)), value_of(alpha_in, block, 0.0) or None
        rate = value_of(rate_of, block, 1.0)
        if rank and rate:
            size = _size(config, rank, alpha)
            if config.conv_rank and _is_conv(unet.get_submodule(name)):
                size = conv_size(config)
            sizes[name] = replace(size, rate=rate, on_input=name.endswith(ON_INPUT))
    if not sizes:
        raise ConfigError(["block_ranks: expected a block that is trained, found 0 in all"])
    return sizes


def text_sizes(config: Config, encoder: ClipEncoder, network: str) -> dict[str, Size]:
    """Of each module of a text encoder that is trained. Raises ConfigError."""
    names = select_text(encoder.inner, encoder.layers)
    if not names:
        raise ConfigError([f"clip_skip: {encoder.clip_skip} leaves no layer of the text encoder to train"])
    rank = config.text_encoder_rank or config.lora_rank
    size = _size(config, rank, config.text_encoder_alpha)
    called = {name: text_layer(network, name) for name in names}
    kept = _filtered(config, list(called.values()), f"the {network.replace('_', ' ')}")
    return {name: replace(size, on_input=name.endswith(ON_INPUT)) for name in names if called[name] in kept}


def text_layer(network: str, name: str) -> str:
    """A text encoder's module as a run calls it."""
    return layer_name(network, text_name(name))


def alpha_of(config: Config) -> float:
    """lora_alpha, by default twice the rank."""
    return float(2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha)


def learning_rate_of(config: Config, network: str) -> float:
    """A text encoder's is by default a fifth of the UNet's, or the same where the optimizer knows only one."""
    if network == "unet":
        return config.learning_rate
    if network == "text_encoder_2" and config.text_encoder_2_lr is not None:
        return config.text_encoder_2_lr
    share = 1.0 if config.optimizer in ONE_RATE else 0.2
    return config.learning_rate * share if config.text_encoder_lr is None else config.text_encoder_lr


def up_ratio_of(config: Config) -> float:
    """loraplus_lr_ratio, by default 4 (docs/defaults.md), or 1 where there are no up matrices or the optimizer knows
    only one rate."""
    if config.loraplus_lr_ratio is not None:
        return config.loraplus_lr_ratio
    return 4.0 if KINDS[config.adapter].is_lora and config.optimizer not in ONE_RATE else 1.0


def adapter_notices(config: Config) -> Iterator[str]:
    """What a kind of adapter does not do, and which hosts do not know it."""
    if config.adapter in SAID:
        yield f"adapter {config.adapter}: {SAID[config.adapter]}"
    if config.adapter in WITHOUT_PRODUCT and config.lora_dropout:
        yield (
            f"lora_dropout: {config.adapter} has no inner values to leave out, {config.lora_dropout:g} does nothing; "
            "rank_dropout and module_dropout work"
        )


def step_notices(config: Config, steps: int) -> Iterator[str]:
    """Of a run whose pictures and epochs make few steps."""
    if steps < FEW_STEPS and config.max_train_steps is None:
        epochs = math.ceil(config.epochs * GOOD_STEPS / steps)
        yield (
            f"{steps} steps are few: with 16 pictures of one thing, about {GOOD_STEPS} gave the lowest held-out loss "
            f"(docs/defaults.md). epochs={epochs} gives as many"
        )


def usual_size(config: Config) -> Size:
    """Of a module of which nothing else is said."""
    return _size(config, config.lora_rank, None)


def conv_size(config: Config) -> Size:
    """Of a convolution where there is a conv_rank."""
    return _size(config, config.conv_rank, config.conv_alpha)


def _size(config: Config, rank: int, alpha: float | None) -> Size:
    """The alpha of a file, which loaders divide by the rank; OFT's is a constraint, of which 0 is none.
    Rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) divides by its root instead."""
    if config.adapter == "ia3":
        return Size(None, None)
    if config.adapter == "oft":
        return Size(rank, 0.0)
    if config.rank_stabilized:
        return Size(rank, (alpha_of(config) if alpha is None else alpha) * math.sqrt(rank), factor=config.lokr_factor)
    alpha = alpha_of(config) * (rank / config.lora_rank) if alpha is None else alpha
    return Size(rank, alpha, factor=config.lokr_factor)


def _filtered(config: Config, names: Sequence[str], network: str) -> tuple[str, ...]:
    found = filtered(names, config.include_modules, config.exclude_modules)
    if names and not found:
        key = "include_modules" if config.include_modules else "exclude_modules"
        raise ConfigError(
            [f"{key}: expected patterns that leave a module of {network}, such as {names[0]}, found none"]
        )
    return found


def _known_blocks(config: Config, blocks: set[str]) -> None:
    for key in BLOCKS:
        for block in block_values(getattr(config, key)):
            if not any(known.startswith(block) for known in blocks):
                there = ", ".join(sorted(blocks - {""}))
                raise ConfigError([f"{key}: expected blocks that the model has ({there}), found {block}"])


def _has_weights(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
