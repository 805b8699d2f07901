"""What the loaded model predicts, and on which noise schedule: as the WebUI draws with it and as its file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules import shared

from lora_trainer.hosts.webui.tensors import file_keys
from lora_trainer.models.checkpoint import V_PREDICTION, ZERO_TERMINAL
from lora_trainer.models.flow import Flow, shifted
from lora_trainer.models.noise import NoiseSchedule, Prediction

_PREDICTIONS: dict[str, Prediction] = {"eps": "epsilon", "v": "v"}
_SETTING, _ON = "Noise schedule for sampling", "Zero Terminal SNR"


def drawn_as(sd_model: Any) -> tuple[NoiseSchedule | Flow, tuple[str, ...]]:
    """The schedule to train on, and in words where the WebUI draws otherwise.

    A YAML beside the checkpoint says what is predicted, else the file's key, which WebUI 1.10 does not read, else the
    WebUI. The schedule ends without signal where the file's key says so, or where a model that predicts v is drawn so.
    """
    if getattr(sd_model, "is_sd3", False):
        # Its own table is rounded to half precision with the model.
        return Flow(shifted(float(sd_model.model.model_sampling.shift))), ()
    keys, told = file_keys(sd_model), []
    prediction = _PREDICTIONS[sd_model.parameterization]
    yaml = Path(sd_model.sd_checkpoint_info.filename).with_suffix(".yaml")
    if V_PREDICTION in keys and prediction == "epsilon" and not yaml.is_file():
        prediction = "v"
        told.append(
            "base model: its key v_pred says that it predicts v, and so it is trained; this WebUI draws it as epsilon, "
            f"previews too, until {yaml.name} beside it says otherwise: a copy of {_copied(sd_model)}"
        )
    noise = NoiseSchedule(sd_model.alphas_cumprod_original.float(), prediction)
    drawn_without_signal = getattr(shared.opts, "sd_noise_schedule", "") == _ON
    if ZERO_TERMINAL in keys and not drawn_without_signal:
        told.append(
            "base model: its key ztsnr says that its noise schedule ends without signal, and so it is trained; this "
            f"WebUI draws it otherwise until its setting {_SETTING} is {_ON}"
        )
    if drawn_without_signal and prediction == "epsilon":
        told.append(
            f"the WebUI's setting {_SETTING} is {_ON}: not followed, since a model that predicts noise learns nothing "
            "where there is no signal"
        )
    ends_in_noise = ZERO_TERMINAL in keys or (drawn_without_signal and prediction == "v")
    return noise.zero_terminal() if ends_in_noise else noise, tuple(told)


def _copied(sd_model: Any) -> str:
    """What to copy beside a checkpoint that predicts v."""
    if hasattr(sd_model, "conditioner"):
        return "the WebUI's sd_xl_base.yaml with VScaling in place of EpsScaling"
    return 'the YAML that the WebUI loads it with, and under params: parameterization: "v"'
