"""The extension as its tab and its API see it, and its place in the WebUI's callbacks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from modules import infotext_utils, paths_internal, script_callbacks, sd_models, shared

from lora_trainer.api import mount, mount_editor
from lora_trainer.config import Config, build, output_name_of, words_of
from lora_trainer.config.options import options
from lora_trainer.config.presets import preset_keys
from lora_trainer.config.rules import unsearchable
from lora_trainer.doctor import Report, examine
from lora_trainer.doctor.subject import Wanted
from lora_trainer.editing.editor import Editor
from lora_trainer.editing.thumbnails import Thumbnails
from lora_trainer.errors import ConfigError, DataError, ModelError
from lora_trainer.events import EventSink, Finished
from lora_trainer.hosts.ports import Control
from lora_trainer.hosts.roots import Roots
from lora_trainer.hosts.webui.captioning import Captioning
from lora_trainer.hosts.webui.interrupt import watch_reloads
from lora_trainer.hosts.webui.merged import make_known
from lora_trainer.hosts.webui.store import lora_dir, named_lora
from lora_trainer.hosts.webui.tensors import refusal
from lora_trainer.jobs.service import JobService
from lora_trainer.jobs.view import JobView
from lora_trainer.ui.ports import Checkpoint

# How long someone waits before the page for what the doctor says.
CHECK_SECONDS = 20.0
TITLE, ELEMENT = "Train LoRA", "lora_trainer_tab"


class Extension:
    """The TabHost, ApiHost and EditorHost. One for the process: Reload UI makes a new tab over the same jobs."""

    def __init__(self) -> None:
        self.home = Path(paths_internal.data_path) / "lora_trainer"
        self.jobs = JobService(self.home / "jobs", work, find=find)
        self.captioning = Captioning(self._roots)
        self.editor, self.thumbnails = Editor(), Thumbnails(self.home / "thumbnails")
        self.editor_pass = secrets.token_urlsafe(32)
        self._checking = Lock()
        self._looked_at: tuple[tuple[str, str | None] | None, str | None] = (None, None)

    @property
    def credentials(self) -> Mapping[str, str] | None:
        pairs = (shared.cmd_opts.api_auth or "").split(",")
        return dict(pair.split(":", 1) for pair in pairs if ":" in pair) or None

    @property
    def non_local(self) -> bool:
        return bool(shared.cmd_opts.webui_is_non_local)

    def checkpoint(self) -> Checkpoint | None:
        # Not shared.sd_model, which would load one.
        sd_model = sd_models.model_data.sd_model
        if sd_model is None:
            return None
        refused = self._refused(sd_model)
        warnings = [f"It cannot be trained on: {refused}"] if refused else _merged(sd_model)
        return Checkpoint(sd_model.sd_checkpoint_info.title, tuple(warnings), _family(sd_model), refused)

    def submit(self, settings: Mapping[str, object]) -> JobView:
        """Raises UserError."""
        return self.jobs.submit(self._config(settings))

    def find_rate(self, settings: Mapping[str, object]) -> JobView:
        """Raises UserError."""
        config = self._config(settings)
        if problems := list(unsearchable(config)):
            raise ConfigError(problems)
        return self.jobs.submit(config, "find-lr")

    def _config(self, settings: Mapping[str, object]) -> Config:
        """Raises UserError."""
        given = self._roots().settings(_given(settings))
        checkpoint = self.checkpoint()
        if checkpoint is None and "base_model" not in given:
            raise DataError("no checkpoint is loaded; choose one at the top of the page, wait, and train again")
        if checkpoint is not None and checkpoint.refused and "base_model" not in given:
            raise ModelError(checkpoint.refused)
        run = self.home / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        known = {
            "base_model": checkpoint.title if checkpoint else "",
            "output_dir": str(run),
            "cache_dir": str(self.home / "cache"),
        }
        config = build(known, given, family=checkpoint.family if checkpoint else "sd15")
        if config.base_precision != "auto":
            raise ConfigError(
                [
                    f"base_precision: expected auto, found {config.base_precision!r}: the loaded checkpoint is used as "
                    "the WebUI stores it, and one stored anew would be a second copy; its setting FP8 weight takes less"
                ]
            )
        return config

    def _refused(self, sd_model: Any) -> str | None:
        """Looked at once a checkpoint, since the tab asks all the time."""
        which = (sd_model.sd_checkpoint_info.filename, sd_model.sd_model_hash)
        if self._looked_at[0] != which:
            self._looked_at = (which, refusal(sd_model))
        return self._looked_at[1]

    def check(self, settings: Mapping[str, object]) -> Report:
        """Raises UserError."""
        given = self._roots().settings(_given(settings))
        config = build({"base_model": "the loaded one", "output_dir": str(self.home)}, given)
        resolution = config.resolution or Wanted.resolution
        wanted = Wanted(resolution, config.allow_upscaling, config.trigger_words, config.masked_loss)
        # Clicks of many visitors would take all processor cores.
        if not self._checking.acquire(blocking=False):
            raise DataError("the doctor is looking at other pictures just now; try again in half a minute")
        try:
            metadata = Path(config.metadata_path) if config.metadata_path else None
            folder = Path(config.train_data_dir)
            return examine(
                folder, metadata=metadata, concepts=config.concepts, wanted=wanted, most_seconds=CHECK_SECONDS
            )
        finally:
            self._checking.release()

    def allowed(self, settings: Mapping[str, object]) -> dict[str, Any]:
        """Raises ConfigError."""
        return self._roots().settings(settings)

    def upload_folder(self) -> Path:
        """Raises DataError."""
        folder = self.home / "uploads" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise DataError(f"upload: {folder}: cannot be made: {error.strerror}") from None
        return folder

    def prompt(self, job: JobView, weight: float = 0.8) -> str:
        words = words_of(job.settings)
        name = self._newest(job) or job.name or output_name_of(build(job.settings))
        return " ".join(filter(None, (words, f"<lora:{name}:{weight:g}>")))

    def _newest(self, job: JobView) -> str | None:
        """In a pause: the name under which prompts now know the LoRA as it is."""
        files = [Path(path) for path in job.output[-1:] if path.endswith(".safetensors")]
        known = job.state == "paused" and bool(files) and files[0].is_file() and make_known(files)
        return files[0].stem if known else None

    def grid(self, job: JobView) -> str | None:
        files = [Path(path) for path in job.output if path.endswith(".safetensors") and Path(path).is_file()]
        if len(files) < 2 or not make_known(files):
            return None
        tags = [f"<lora:{file.stem}:0.8>" for file in files]
        words = words_of(job.settings)
        prompt = " ".join(filter(None, (words, tags[0])))
        # The WebUI takes a last line as settings from three of them on.
        return f"{prompt}\nScript: X/Y/Z plot, X Type: Prompt S/R, X Values: {json.dumps(', '.join(tags))}"

    def send_to_txt2img(self, button: Any, text: Any) -> None:
        infotext_utils.register_paste_params_button(
            infotext_utils.ParamBinding(paste_button=button, tabname="txt2img", source_text_component=text)
        )

    def _roots(self) -> Roots:
        folders = [Path(paths_internal.data_path), Path(paths_internal.models_path), lora_dir()]
        return Roots(folders, enforced=self.non_local)


def work(_: str, config: Config, sink: EventSink, control: Control) -> Finished:
    # Late, so that start-up does not pay for diffusers and peft.
    from lora_trainer.hosts.webui.train import train

    return train(config, sink, control)


def find(_: str, config: Config, sink: EventSink, control: Control) -> Finished:
    from lora_trainer.hosts.webui.train import find as find_here

    return find_here(config, sink, control)


@cache
def extension() -> Extension:
    """The only state of the process: scripts are run again on Reload UI, the package stays."""
    return Extension()


def register() -> None:
    """Hook the extension into the WebUI; called by its script at each (re)load."""
    watch_reloads()
    script_callbacks.on_ui_tabs(tab)
    script_callbacks.on_app_started(started)


def tab() -> list[tuple[Any, str, str]]:
    from lora_trainer.ui.tab import build as build_tab

    return [(build_tab(extension()), TITLE, ELEMENT)]


def started(_: Any, app: Any) -> None:
    mount_editor(app, extension())
    if shared.cmd_opts.api or shared.cmd_opts.nowebui:
        mount(app, extension())


def _given(settings: Mapping[str, object]) -> dict[str, object]:
    """What is set. Nothing is a value where it is allowed and a preset might give another; a LoRA's name becomes its
    file."""
    kept = {key for key in preset_keys() if options()[key].optional}
    given = {key: value for key, value in settings.items() if value is not None or key in kept}
    if isinstance(given.get("initial_lora"), str):
        given["initial_lora"] = named_lora(given["initial_lora"])
    return given


def _family(sd_model: Any) -> str:
    kinds = {"sdxl": "is_sdxl", "sd3": "is_sd3"}
    return next((family for family, kind in kinds.items() if getattr(sd_model, kind, False)), "sd15")


def _merged(sd_model: Any) -> list[str]:
    name = sd_model.sd_checkpoint_info.name_for_extra.lower()
    warning = "This looks like a merge: LoRAs trained on its ancestors work with more models."
    return [warning] if "merge" in name else []
