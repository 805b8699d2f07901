"""Puts the stand-in into this process for as long as a test runs, and offers what a user does with a WebUI."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL.Image import Image

ROOT = Path(__file__).parent / "webui"
LORA = ROOT / "extensions-builtin" / "Lora"
HOST = "lora_trainer.hosts.webui"
OURS = ("modules", "models", HOST, *(path.stem for path in LORA.glob("*.py")))


class FakeWebUI:
    """A started WebUI; `data` is its data folder."""

    def __init__(self, data: Path, lora: bool) -> None:
        self.data = data
        self.loras = data / "models" / "Lora"
        self.loras.mkdir(parents=True, exist_ok=True)
        self("paths_internal").data_path = str(data)
        self("paths_internal").models_path = str(data / "models")
        if lora:
            self._switch_lora_on()
        self("sd_models").list_models()
        self("shared").opts.sd_model_checkpoint = next(iter(self("sd_models").checkpoints_list))

    def __call__(self, name: str) -> ModuleType:
        """One of its `modules`."""
        return importlib.import_module(f"modules.{name}")

    def host(self, name: str) -> ModuleType:
        """One of the extension's, as imported by this WebUI."""
        return importlib.import_module(f"{HOST}.{name}")

    def _switch_lora_on(self) -> None:
        """As its script does at start-up."""
        networks = importlib.import_module("networks")
        networks.originals = importlib.import_module("lora_patches").LoraPatches()
        networks.extra_network_lora = importlib.import_module("extra_networks_lora").ExtraNetworkLora()
        self("extra_networks").register_extra_network(networks.extra_network_lora)
        self("script_callbacks").on_model_loaded(networks.assign_network_names_to_compvis_modules)
        self("script_callbacks").on_script_unloaded(networks.originals.undo)

    @property
    def networks(self) -> ModuleType:
        return sys.modules["networks"]

    @property
    def state(self) -> Any:
        return self("shared").state

    @property
    def lock(self) -> Any:
        return self("call_queue").queue_lock

    @property
    def model(self) -> Any:
        return self("sd_models").model_data.get_sd_model()

    def info(self, name: str) -> Any:
        return self("sd_models").get_closet_checkpoint_match(name)

    def choose(self, name: str) -> None:
        """At the top of the page: loaded as soon as the queue is free."""
        self("shared").opts.set("sd_model_checkpoint", self.info(name).title)
        self("call_queue").wrap_queued_call(lambda: self("sd_models").reload_model_weights())()

    def draw(self, prompt: str = "a cat", **settings: Any) -> Image | None:
        """A click on Generate; None where it was interrupted before the first picture."""
        processing = self("processing")
        defaults = {"seed": 1, "steps": 2, "width": 64, "height": 64}

        def txt2img() -> list[Image]:
            p = processing.StableDiffusionProcessingTxt2Img(prompt=prompt, **(defaults | settings))
            return processing.process_images(p).images

        return next(iter(self("call_queue").wrap_gradio_gpu_call(txt2img)()), None)

    def picture(self, prompt: str = "a cat", **settings: Any) -> bytes:
        return self.draw(prompt, **settings).tobytes()

    def digest(self) -> str:
        """SHA-256 over all tensors of the loaded model, with whatever is merged into them."""
        whole = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            whole.update(name.encode() + tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()


@contextmanager
def installed(data: Path, *, lora: bool = True) -> Iterator[FakeWebUI]:
    """The extension's modules for this host are imported anew, so no test sees another's WebUI."""
    before = _taken_out()
    paths = [str(ROOT), *([str(LORA)] if lora else [])]
    sys.path[:0] = paths
    try:
        webui = FakeWebUI(data, lora)
        try:
            yield webui
        finally:
            webui("script_callbacks").script_unloaded_callback()
    finally:
        for path in paths:
            sys.path.remove(path)
        _taken_out()
        sys.modules.update(before)


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if any(name == ours or name.startswith(f"{ours}.") for ours in OURS)]
    taken = {name: sys.modules.pop(name) for name in names}
    package = sys.modules.get("lora_trainer.hosts")
    if package is not None:
        vars(package).pop("webui", None)
    return taken
