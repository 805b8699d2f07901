"""The settings of what is minimised: noise, timesteps and loss. They bear kohya's names where its trainer has them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from lora_trainer.config.declare import about

OBJECTIVE = "Noise and loss"


class Objective(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of `schema.Config`. The held-out loss is measured without any of them, so that curves can be compared."""

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
    max_timestep: Annotated[int, about(OBJECTIVE, "Training stays below this timestep, of 1000.", ge=1, le=1000)] = 1000
    zero_terminal_snr: Annotated[
        bool, about(OBJECTIVE, "For a v-prediction model: the last timestep is nothing but noise.")
    ] = False
