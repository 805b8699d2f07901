"""The settings of what is minimised, and by which rule. They bear kohya's names where its trainer has them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from lora_trainer.config.declare import about
from lora_trainer.config.modes import Modes

OPTIMIZER, OBJECTIVE = "Optimizer", "Noise and loss"


class Learning(Modes, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of `schema.Config`. The held-out loss is always the plain one, so that curves can be
    compared; only a mask holds of it too."""

    lr_scheduler: Annotated[
        Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "rex"],
        about(OPTIMIZER, "How the learning rate goes down over the run."),
    ] = "constant"
    lr_scheduler_num_cycles: Annotated[
        int, about(OPTIMIZER, "How often cosine_with_restarts begins at the top.", ge=1, le=1000)
    ] = 1
    lr_scheduler_power: Annotated[
        float, about(OPTIMIZER, "How steeply polynomial begins; 1 is linear.", gt=0, le=100)
    ] = 1.0
    lr_warmup_steps: Annotated[int, about(OPTIMIZER, "Steps over which the learning rate rises from 0.", ge=0)] = 0
    lr_warmup_ratio: Annotated[
        float, about(OPTIMIZER, "The same as a share of the run, instead of lr_warmup_steps.", ge=0, lt=1)
    ] = 0.0
    optimizer: Annotated[
        Literal[
            "adamw",
            "adamw8bit",
            "lion",
            "adafactor",
            "prodigy",
            "prodigyplusschedulefree",
            "adamwschedulefree",
            "came",
            "custom",
        ],
        about(OPTIMIZER, "The update rule. All but adamw are of other packages; custom: see optimizer_class."),
    ] = "adamw"
    optimizer_class: (
        Annotated[str, about(OPTIMIZER, "For optimizer custom: module.Class. Only on the command line.")] | None
    ) = None
    optimizer_args: Annotated[
        list[str], about(OPTIMIZER, "More arguments of an optimizer of another package: d_coef=2, betas=(0.9, 0.99).")
    ] = msgspec.field(default_factory=list)
    weight_decay: Annotated[
        float, about(OPTIMIZER, "The optimizer's pull towards zero; a custom one has its own.", ge=0, le=1)
    ] = 0.01
    ema_decay: (
        Annotated[
            float,
            about(
                OPTIMIZER,
                "Save the average over steps: 0.99 forgets after about 100; 0: the last step. 0.97 when left out.",
                ge=0,
                lt=1,
            ),
        ]
        | None
    ) = None
    max_grad_norm: Annotated[
        float, about(OPTIMIZER, "Longer gradients are shortened to this; 0 switches it off.", ge=0)
    ] = 1.0

    loss_type: Annotated[
        Literal["l2", "l1", "huber", "smooth_l1"],
        about(OBJECTIVE, "How errors count: l2 squared; l1, huber and smooth_l1 forgive pictures that do not fit."),
    ] = "l2"
    huber_schedule: Annotated[
        Literal["constant", "exponential", "snr"],
        about(OBJECTIVE, "Where huber and smooth_l1 forgive more: everywhere alike, or at the noisy timesteps."),
    ] = "snr"
    huber_c: Annotated[
        float, about(OBJECTIVE, "Errors above this are forgiven by huber and smooth_l1.", gt=0, le=10)
    ] = 0.1
    min_snr_gamma: Annotated[
        float, about(OBJECTIVE, "Min-SNR: nearly clean timesteps count less. 5 is usual; 0: off.", ge=0, le=1000)
    ] = 0.0
    soft_min_snr_gamma: Annotated[
        float, about(OBJECTIVE, "Min-SNR without its edge. 4 is usual; 0: off.", ge=0, le=1000)
    ] = 0.0
    debiased_estimation_loss: Annotated[
        bool, about(OBJECTIVE, "Each timestep counts by 1 / sqrt(SNR), for cleaner pictures early on.")
    ] = False
    scale_v_pred_loss_like_noise_pred: Annotated[
        bool, about(OBJECTIVE, "For a v-prediction model: timesteps count as they do for a noise-prediction one.")
    ] = False
    masked_loss: Annotated[
        bool,
        about(OBJECTIVE, "Learn a part of each picture: by mask_dir, NAME-masklabel.png beside it, or transparency."),
    ] = False
    unmasked_weight: Annotated[
        float, about(OBJECTIVE, "How much the rest of a masked picture counts; 0: not at all.", ge=0, le=1)
    ] = 0.1
    prior_loss_weight: Annotated[
        float,
        about(OBJECTIVE, "How much each regularisation picture counts; a training picture counts 1.", ge=0, le=1000),
    ] = 1.0
    preservation_weight: Annotated[
        float,
        about(
            OBJECTIVE,
            "Output preservation: hold the LoRA without its words at the base; 1 is usual, 0: off.",
            ge=0,
            le=1000,
        ),
    ] = 0.0
    preservation_prompt: (
        Annotated[
            str,
            about(OBJECTIVE, "Words for the class in place of the trigger words, and for pictures to keep: person."),
        ]
        | None
    ) = None
    noise_offset: Annotated[
        float, about(OBJECTIVE, "Shifts the noise of a whole picture, for very dark and bright ones: 0.05.", ge=0, le=1)
    ] = 0.0
    adaptive_noise_scale: Annotated[
        float,
        about(OBJECTIVE, "Adds this times a picture's own brightness to noise_offset.", ge=-10, le=10),
    ] = 0.0
    multires_noise_iterations: Annotated[
        int,
        about(OBJECTIVE, "Noise in this many coarser sizes too, for light and colour: 6 to 10; 0: off.", ge=0, le=16),
    ] = 0
    multires_noise_discount: Annotated[
        float, about(OBJECTIVE, "How much each coarser size counts, of the one before.", gt=0, le=1)
    ] = 0.3
    ip_noise_gamma: Annotated[
        float,
        about(OBJECTIVE, "Input perturbation: more noise in the picture than is asked for: 0.1; 0: off.", ge=0, le=1),
    ] = 0.0
    timestep_sampling: Annotated[
        Literal["uniform", "logit_normal", "cubic"],
        about(OBJECTIVE, "Which timesteps are trained most: all alike, the middle, or the noisy ones (composition)."),
    ] = "uniform"
    logit_mean: Annotated[float, about(OBJECTIVE, "The middle of logit_normal: above 0 noisier.", ge=-10, le=10)] = 0.0
    logit_std: Annotated[float, about(OBJECTIVE, "The width of logit_normal.", gt=0, le=10)] = 1.0
    min_timestep: Annotated[int, about(OBJECTIVE, "The least noisy timestep that is trained.", ge=0, le=999)] = 0
    max_timestep: (
        Annotated[
            int,
            about(
                OBJECTIVE,
                "Training stays below this timestep, of 1000; the model's own when left out: 200 for the SDXL refiner.",
                ge=1,
                le=1000,
            ),
        ]
        | None
    ) = None
    zero_terminal_snr: Annotated[
        bool, about(OBJECTIVE, "For a v-prediction model: the last timestep is nothing but noise.")
    ] = False
