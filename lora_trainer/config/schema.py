"""Every setting, declared once.

YAML keys, command-line flags, the template, the table of options, the file header and, later, the tab's controls
are derived from these fields: type, bounds, default, help and group.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lora_trainer.config.adapting import LORA, Adapting
from lora_trainer.config.declare import about as _about
from lora_trainer.config.judging import PREVIEWS
from lora_trainer.config.learning import OBJECTIVE, OPTIMIZER
from lora_trainer.config.modes import MODES
from lora_trainer.config.presets import NONE, PRESETS

MODEL, DATA, CAPTIONS = "Model", "Data", "Captions"
TRAINING, OUTPUT = "Training", "Output"
GROUPS = (MODEL, DATA, CAPTIONS, MODES, LORA, TRAINING, OPTIMIZER, OBJECTIVE, OUTPUT, PREVIEWS)
# Larger numbers before a folder's name are years and the like.
MAX_REPEATS = 1000
# The options that name a file or a folder.
PATHS = (
    *("base_model", "train_data_dir", "metadata_path", "validation_data_dir", "mask_dir", "reg_data_dir"),
    *("original_data_dir", "initial_lora", "cache_dir", "output_dir", "clip_model_dir"),
)
# The options that name code to run: neither a visitor of the WebUI nor a file may give them.
TRUSTED = ("optimizer_class",)


class Concept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry of `concepts`, checked as a Config is."""

    folder: Annotated[str, _about(DATA, "In train_data_dir (. is itself), or a path elsewhere.")]
    repeats: Annotated[int, _about(DATA, "How often an epoch sees each of its pictures.", ge=1, le=MAX_REPEATS)] = 1
    trigger_words: Annotated[str, _about(DATA, "In place of the run's trigger_words.")] | None = None
    caption: Annotated[str, _about(DATA, "The caption of pictures that have none.")] = ""
    regularization: Annotated[str, _about(DATA, "A folder of its own in place of the run's reg_data_dir.")] | None = (
        None
    )


class Config(Adapting, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run's settings. Only `config.build` makes one, since constructing it checks nothing."""

    preset: Annotated[
        Literal[(NONE, *PRESETS)],
        _about(
            MODEL, "Settings for what is to be learned, as the table of presets has them; any setting beside it wins."
        ),
    ] = NONE
    base_model: Annotated[
        str,
        _about(
            MODEL,
            "The checkpoint to train on: a single-file Stable Diffusion 1.x, 2.x, 3 or SDXL .safetensors or .ckpt.",
        ),
    ]
    mixed_precision: Annotated[
        Literal["fp16", "bf16", "no"],
        _about(
            MODEL, "The number format of the frozen model and its products. On a CPU fp16 becomes fp32, and says so."
        ),
    ] = "fp16"
    base_precision: Annotated[
        Literal["auto", "fp8", "int8", "nf4"],
        _about(
            MODEL,
            "The frozen UNet's matrices: auto as mixed_precision computes, in fewer bits only where auto_fit must; "
            "int8 and nf4 (4 bits) need bitsandbytes.",
        ),
    ] = "auto"
    device: Annotated[
        str, _about(MODEL, "Where to train: auto (the first GPU, else the CPU), cpu, cuda, cuda:1 and so on.")
    ] = "auto"
    clip_skip: (
        Annotated[
            int,
            _about(
                MODEL,
                "Which layer of the text encoder speaks, counted from the last; as the host has it, else 1.",
                ge=1,
                le=12,
            ),
        ]
        | None
    ) = None
    cpu_threads: (
        Annotated[int, _about(MODEL, "CPU threads to compute with; torch's choice when left out.", ge=1)] | None
    ) = None

    train_data_dir: Annotated[
        str,
        _about(DATA, "The folder of training pictures, with captions in metadata.csv, metadata.jsonl or .txt files."),
    ]
    concepts: Annotated[
        list[Concept],
        _about(
            DATA, "Only these folders, each in its own way: castle or {folder: castle, repeats: 10, trigger_words: x}."
        ),
    ] = msgspec.field(default_factory=list)
    metadata_path: (
        Annotated[str, _about(DATA, "A caption file elsewhere or under another name (.csv or .jsonl).")] | None
    ) = None
    validation_data_dir: (
        Annotated[str, _about(DATA, "A folder of pictures that are never trained on, to measure what was learned.")]
        | None
    ) = None
    validation_split: Annotated[
        float,
        _about(DATA, "Hold out this share of the training pictures instead of a folder of their own.", ge=0, le=0.5),
    ] = 0.0
    resolution: (
        Annotated[
            int,
            _about(
                DATA,
                "Pictures are cut to about this many pixels squared; the model's own size when left out.",
                ge=64,
                le=4096,
                multiple_of=64,
            ),
        ]
        | None
    ) = None
    extra_resolutions: Annotated[
        list[Annotated[int, Meta(ge=64, le=4096, multiple_of=64)]],
        _about(DATA, "Show each picture at these sizes too, once an epoch at each that it is large enough for."),
    ] = msgspec.field(default_factory=list)
    allow_upscaling: Annotated[bool, _about(DATA, "Enlarge pictures that are smaller than the resolution.")] = False
    crop: Annotated[
        Literal["center", "focus", "random"],
        _about(DATA, "Which part of a picture of another shape is kept: the middle, the most detailed, or any."),
    ] = "center"
    crops_per_image: Annotated[
        int, _about(DATA, "Parts of a picture that are encoded, from edge to edge, for crop random.", ge=2, le=64)
    ] = 5
    flip: Annotated[bool, _about(DATA, "Mirror pictures half of the time; not where sides differ: text, logos.")] = (
        False
    )
    mask_dir: (
        Annotated[str, _about(DATA, "For masked_loss: masks under their pictures' names; what is white is learned.")]
        | None
    ) = None
    reg_data_dir: (
        Annotated[
            str,
            _about(DATA, "Regularisation pictures: of the same kind without what is new, so that it stays as it is."),
        ]
        | None
    ) = None
    cache_dir: (
        Annotated[
            str,
            _about(DATA, "A folder that keeps encoded pictures and captions for the next run; else in memory only."),
        ]
        | None
    ) = None
    trigger_words: Annotated[
        str, _about(DATA, "Words put in front of each caption that lacks them, and named in the file.")
    ] = ""

    caption_syntax: Annotated[
        Literal["literal", "webui"],
        _about(CAPTIONS, "Plain text, or with the WebUI's (emphasis), embeddings and BREAK as in its prompts."),
    ] = "literal"
    shuffle_captions: Annotated[
        bool, _about(CAPTIONS, "Mix the tags of a caption, which commas part, anew each time its picture is seen.")
    ] = False
    keep_tokens: Annotated[
        int,
        _about(CAPTIONS, "Tags at the beginning that are neither mixed nor dropped; or write ||| after them.", ge=0),
    ] = 0
    tag_dropout: Annotated[float, _about(CAPTIONS, "Share of the tags left out at random each time.", ge=0, le=1)] = 0.0
    caption_dropout: Annotated[
        float, _about(CAPTIONS, "How often a picture is shown with an empty caption: 0.05 to 0.1.", ge=0, le=1)
    ] = 0.0
    wildcards: Annotated[
        bool, _about(CAPTIONS, "Choose one of {a|b|c} in captions, and one line of a .txt file, anew each time.")
    ] = False
    caption_prefix: Annotated[str, _about(CAPTIONS, "Words in front of every caption.")] = ""
    caption_suffix: Annotated[str, _about(CAPTIONS, "Words after every caption.")] = ""

    batch_size: Annotated[int, _about(TRAINING, "Pictures at once. Lower it when memory runs out.", ge=1, le=1024)] = 4
    gradient_accumulation_steps: Annotated[
        int,
        _about(TRAINING, "Batches added up for one step; the effective batch is batch_size times this.", ge=1, le=1024),
    ] = 1
    epochs: Annotated[int, _about(TRAINING, "How often each picture is seen.", ge=1, le=100_000)] = 10
    max_train_steps: (
        Annotated[int, _about(TRAINING, "Stop after this many steps, whatever epochs says.", ge=1)] | None
    ) = None
    learning_rate: Annotated[float, _about(TRAINING, "Size of a step. 2e-4 when it overfits.", gt=0, le=1)] = 5e-4
    gradient_checkpointing: Annotated[
        bool, _about(TRAINING, "Save memory by computing activations twice; about a third slower.")
    ] = False
    auto_fit: Annotated[
        bool,
        _about(TRAINING, "When a forecast does not fit into the GPU, take a lighter plan, not only say so."),
    ] = True
    enable_xformers: Annotated[
        bool,
        _about(TRAINING, "Accepted and not needed: torch's own attention (SDPA) already saves the same memory."),
    ] = False
    deterministic: Annotated[bool, _about(TRAINING, "On a GPU, only operations that repeat bit by bit; slower.")] = (
        False
    )
    kernels: Annotated[
        Literal["auto", "triton", "plain"],
        _about(
            TRAINING,
            "Faster kernels on a GPU: auto takes them once they are compiled, triton waits for that, plain never.",
        ),
    ] = "auto"
    seed: Annotated[int, _about(TRAINING, "The same seed gives the same run.", ge=0, le=2**32 - 1)] = 42
    trial: Annotated[bool, _about(TRAINING, "A few steps on a few pictures, then how long the full run will take.")] = (
        False
    )

    output_dir: Annotated[str, _about(OUTPUT, "The folder for the LoRA, its settings and the logs.")] = "./output"
    output_name: (
        Annotated[
            str,
            _about(
                OUTPUT, "The LoRA's name in prompts; from folder, rank and epochs when left out: style-train-r8-e10."
            ),
        ]
        | None
    ) = None
    output_format: Annotated[
        Literal["webui", "diffusers", "both"],
        _about(OUTPUT, "For the WebUI NAME.safetensors, for diffusers pytorch_lora_weights.safetensors."),
    ] = "webui"
    save_precision: Annotated[Literal["fp16", "bf16", "fp32"], _about(OUTPUT, "The number format of the file.")] = (
        "fp16"
    )
    save_steps: Annotated[int, _about(OUTPUT, "Also save every so many steps; 0: only at the end.", ge=0)] = 0
    checkpoint_every: Annotated[
        int,
        _about(
            OUTPUT,
            "Keep a full state to resume from every so many steps, in OUTPUT_DIR/state; 0: only at a pause or the end.",
            ge=0,
        ),
    ] = 100
    overwrite: Annotated[
        bool, _about(OUTPUT, "Replace a LoRA of the same name; otherwise the new one gets a number.")
    ] = False
    log_with: Annotated[
        Literal["csv", "tensorboard"],
        _about(OUTPUT, "Losses go to OUTPUT_DIR/logs as CSV, and to TensorBoard if asked."),
    ] = "csv"
    metadata_private: Annotated[
        bool, _about(OUTPUT, "Keep full paths and sample prompts in the file's header too.")
    ] = False
    training_comment: Annotated[str, _about(OUTPUT, "A note for the file's header.")] = ""

    sample_prompts: Annotated[
        list[str], _about(PREVIEWS, "Prompts to draw with the LoRA during and after training.")
    ] = msgspec.field(default_factory=list)
    sample_every: Annotated[int, _about(PREVIEWS, "Draw them every so many steps; 0: at the end.", ge=0)] = 0
    sample_steps: Annotated[int, _about(PREVIEWS, "Denoising steps of a drawing.", ge=1, le=1000)] = 25
    sample_guidance: Annotated[float, _about(PREVIEWS, "How closely drawings follow their prompts.", ge=0, le=50)] = 5.0
    sample_negative_prompt: Annotated[str, _about(PREVIEWS, "What drawings should not show.")] = ""
