"""The settings of what is trained: on which modules, how large, how fast. They bear kohya's names where its trainer
has them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from lora_trainer.config.declare import about
from lora_trainer.config.judging import Judging

LORA = "LoRA"


class Adapting(Judging, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of `schema.Config`."""

    adapter: Annotated[
        Literal["lora", "dora", "loha", "lokr", "ia3", "oft"],
        about(
            LORA,
            "What is trained: a LoRA, one whose strength is learned apart (DoRA), LyCORIS' LoHa or LoKr, a scale for "
            "each channel (IA³), or rotations (OFT).",
        ),
    ] = "lora"
    lora_rank: Annotated[
        int, about(LORA, "How much the LoRA can hold, and its file size. 4 to 16 for a style.", ge=1, le=1024)
    ] = 8
    lora_alpha: (
        Annotated[float, about(LORA, "Strength of the LoRA is alpha / rank; twice the rank when left out.", gt=0)]
        | None
    ) = None
    rank_stabilized: Annotated[
        bool,
        about(LORA, "Strength is alpha / sqrt(rank), so that large ranks learn as fast as small ones (rsLoRA)."),
    ] = False
    lora_dropout: Annotated[
        float, about(LORA, "Share of the LoRA's inner values left out at random, against overfitting.", ge=0, lt=1)
    ] = 0.1
    rank_dropout: Annotated[
        float, about(LORA, "Share of the ranks left out for a whole picture, in each module anew.", ge=0, lt=1)
    ] = 0.0
    module_dropout: Annotated[
        float, about(LORA, "Share of the modules that are off for a picture, drawn anew each time.", ge=0, lt=1)
    ] = 0.0
    target_modules: Annotated[
        list[str],
        about(
            LORA,
            "In the UNet: the sets default (kohya's 192 modules), conv (adds convolutions), or endings of names: to_q.",
            min_length=1,
        ),
    ] = msgspec.field(default_factory=lambda: ["default"])
    include_modules: Annotated[
        list[str], about(LORA, "Only modules whose names match a pattern, of every network: *.attn2.* and the like.")
    ] = msgspec.field(default_factory=list)
    exclude_modules: Annotated[
        list[str], about(LORA, "Leave out the modules whose names match a pattern: down_blocks.0.* and the like.")
    ] = msgspec.field(default_factory=list)
    conv_rank: (
        Annotated[int, about(LORA, "Train the 3×3 convolutions too, with this rank (LoCon).", ge=1, le=1024)] | None
    ) = None
    conv_alpha: (
        Annotated[float, about(LORA, "Alpha of the convolutions; as strong as the rest when left out.", gt=0)] | None
    ) = None
    lokr_factor: (
        Annotated[int, about(LORA, "Size of LoKr's small factor; near the square root when left out.", ge=2, le=1024)]
        | None
    ) = None
    block_ranks: Annotated[
        list[str],
        about(LORA, "Other ranks in parts of the UNet, by kohya's blocks: IN04=16, or a side: OUT=4; 0 leaves it out."),
    ] = msgspec.field(default_factory=list)
    block_alphas: Annotated[
        list[str], about(LORA, "Alphas of blocks, written alike; as strong as the rest when left out.")
    ] = msgspec.field(default_factory=list)
    block_lrs: Annotated[
        list[str], about(LORA, "Factors of learning_rate in blocks: MID=0.5, OUT=1.5; 0 leaves the block out.")
    ] = msgspec.field(default_factory=list)
    loraplus_lr_ratio: (
        Annotated[
            float,
            about(
                LORA,
                "The up matrices learn this many times faster than the down ones (LoRA+); 1: alike. 4 when left out.",
                gt=0,
                le=100,
            ),
        ]
        | None
    ) = None
    scale_weight_norms: Annotated[
        float, about(LORA, "Keep the norm of each module's change below this: 1 is usual; 0: off.", ge=0)
    ] = 0.0

    initial_lora: (
        Annotated[
            str,
            about(LORA, "Go on from this LoRA: a file, or the name of one in models/Lora. Other ranks are resized."),
        ]
        | None
    ) = None
    train_unet: Annotated[
        bool, about(LORA, "A LoRA on the UNet; off, only the text encoder learns: train_text_encoder.")
    ] = True
    train_text_encoder: Annotated[
        bool, about(LORA, "A LoRA on the text encoder too, for words that it does not know; slower.")
    ] = False
    text_encoder_rank: (
        Annotated[int, about(LORA, "The text encoder's rank; lora_rank when left out.", ge=1, le=1024)] | None
    ) = None
    text_encoder_alpha: (
        Annotated[float, about(LORA, "The text encoder's alpha; as strong as the rest when left out.", gt=0)] | None
    ) = None
    text_encoder_lr: (
        Annotated[
            float, about(LORA, "The text encoder's learning rate; a fifth of learning_rate when left out.", gt=0, le=1)
        ]
        | None
    ) = None
    text_encoder_2_lr: (
        Annotated[float, about(LORA, "That of SDXL's second text encoder; as the first's when left out.", gt=0, le=1)]
        | None
    ) = None
