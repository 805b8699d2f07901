"""The checkpoint that the WebUI has loaded, lent to a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from modules import devices, lowvram, sd_models, sd_vae

from lora_trainer.config import Config
from lora_trainer.errors import ModelError
from lora_trainer.events import EventSink, Notice
from lora_trainer.hosts.webui.merged import unmerge
from lora_trainer.hosts.webui.tensors import networks_of
from lora_trainer.hosts.webui.view import view_of
from lora_trainer.models.fingerprint import sampled
from lora_trainer.models.model import Model


@dataclass(frozen=True)
class Fingerprint:
    """What tells that the loaded model is still the one that was borrowed: its files, the place of each tensor of the
    UNet and the text encoders, and a few of their values (a checkpoint of the same sizes is copied into the live
    module)."""

    checkpoint: str
    vae: str | None
    places: tuple[int, ...]
    values: bytes

    @classmethod
    def of(cls, sd_model: Any) -> Fingerprint:
        tensors = [p.detach() for module in networks_of(sd_model) for p in module.parameters()]
        return cls(
            checkpoint=sd_model.sd_checkpoint_info.filename,
            vae=sd_vae.loaded_vae_file,
            places=tuple(t.data_ptr() for t in tensors),
            values=sampled(tensors),
        )


@dataclass
class LoadedModel:
    """The WebUI's model as a ModelSource. To be used under the queue lock only.

    The first borrowing fixes the checkpoint; when another is found later, the job's own is loaded again.
    """

    config: Config
    sink: EventSink
    _job: Any = field(default=None, init=False)
    _lent: Fingerprint | None = field(default=None, init=False)

    @contextmanager
    def borrow(self, storage: str | None = None) -> Iterator[Model]:
        sd_model = self._ours()
        if unmerge(sd_model):
            self.sink(Notice(text="the LoRAs of the last prompt are taken out of the model for the training"))
        with _on_device(sd_model):
            self._lent = Fingerprint.of(sd_model)
            # No name for the view here: it goes when the run lets go of it, before the GPU's memory is given back.
            yield view_of(sd_model, self.config)

    def still_ours(self) -> bool:
        """After others have used the WebUI: their LoRAs taken out again, whether the model is as it was lent."""
        sd_model = sd_models.model_data.sd_model
        if sd_model is None or self._lent is None:
            return False
        unmerge(sd_model)
        return Fingerprint.of(sd_model) == self._lent

    def give_back(self) -> None:
        """Load what the user has chosen meanwhile, if anything."""
        if self._job is not None and sd_models.model_data.sd_model is not None:
            sd_models.reload_model_weights()

    def _ours(self) -> Any:
        # Waits for the load at start-up; loads the chosen checkpoint where none is there yet.
        sd_model = sd_models.model_data.get_sd_model()
        if sd_model is None:
            raise ModelError("no checkpoint is loaded; choose one at the top of the page, wait, and train again")
        self._job = self._job or self._wanted(sd_model)
        if sd_model.sd_checkpoint_info.filename != self._job.filename:
            self.sink(Notice(text=f"another checkpoint was loaded meanwhile: {self._job.name} is loaded again"))
            # What the user has chosen stays chosen: `give_back` and their next picture load it.
            with sd_models.SkipWritingToConfig():
                sd_model = sd_models.reload_model_weights(sd_model, self._job)
        return sd_model

    def _wanted(self, sd_model: Any) -> Any:
        """The checkpoint that the config names, by title, name or path."""
        wanted, loaded = self.config.base_model, sd_model.sd_checkpoint_info
        if wanted in (loaded.title, loaded.name, loaded.filename, loaded.model_name):
            return loaded
        found = sd_models.get_closet_checkpoint_match(wanted)
        if found is None:
            raise ModelError(f"base_model: the WebUI has no checkpoint called {wanted!r}; loaded is {loaded.title!r}")
        return found


@contextmanager
def _on_device(sd_model: Any) -> Iterator[None]:
    """With --medvram and --lowvram the parts live on the CPU: they are on the GPU while lent."""
    if not getattr(sd_model, "lowvram", False):
        yield
        return
    lowvram.send_everything_to_cpu()
    parts = [sd_model.model, sd_model.first_stage_model, sd_model.cond_stage_model]
    try:
        for part in parts:
            part.to(devices.device)
        yield
    finally:
        # It may have noted a part as the one on the GPU, and would not bring that one again.
        lowvram.send_everything_to_cpu()
        for part in parts:
            part.to(devices.cpu)
        devices.torch_gc()
