"""The settings of how a run is measured on its way, and when it is done."""

from __future__ import annotations

from typing import Annotated

import msgspec

from lora_trainer.config.declare import about
from lora_trainer.config.learning import Learning

PREVIEWS = "Validation and previews"


class Judging(Learning, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of `schema.Config`. Whatever a run minimises, it is measured by the plain loss of the same draws."""

    validate_every: Annotated[
        int,
        about(
            PREVIEWS,
            "Measure the held-out loss every so many steps; 0: at the start and the end, or as early stopping needs.",
            ge=0,
        ),
    ] = 0
    validation_draws: Annotated[
        int,
        about(
            PREVIEWS,
            "Pairs of picture and noise that are measured each time, spread evenly; more is finer and slower.",
            ge=8,
            le=100_000,
        ),
    ] = 64
    save_best: Annotated[
        bool,
        about(PREVIEWS, "Save the step with the lowest held-out loss, and the last one beside it as NAME-stepNUMBER."),
    ] = True
    early_stopping_patience: Annotated[
        int,
        about(
            PREVIEWS, "End when the held-out loss stands still over so many measurements: 5; 0: never.", ge=0, le=1000
        ),
    ] = 0
    measure_drift: Annotated[
        bool,
        about(PREVIEWS, "Also measure how like the pictures drawings become, and how much other prompts change."),
    ] = False
    drift_prompts: Annotated[
        list[str], about(PREVIEWS, "The other prompts, which the LoRA should leave alone; a few usual ones when empty.")
    ] = msgspec.field(default_factory=list)
    clip_model_dir: (
        Annotated[
            str,
            about(
                PREVIEWS, "For measure_drift: a folder with a CLIP model of transformers, for CLIP scores beside it."
            ),
        ]
        | None
    ) = None
