"""Where a run in the WebUI puts its files: the finished LoRA among the WebUI's own, all else in the run's folder."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules import shared

from lora_trainer.errors import ConfigError, OutputError
from lora_trainer.events import EventSink, Notice
from lora_trainer.files import publish
from lora_trainer.hosts.webui.merged import lora_extension
from lora_trainer.models.checkpoint import read_header

LORA = ".safetensors"


@dataclass(frozen=True)
class LoraFolder:
    """A LoraStore over `--lora-dir` and the run's own `folder`."""

    folder: Path
    overwrite: bool
    sink: EventSink

    def free(self, name: str) -> bool:
        """Names are global: over all subfolders, and the names that files give themselves."""
        if name.lower() in {"none", "addams"}:
            raise ConfigError([f"output_name: the WebUI's prompts give {name!r} another meaning; choose another name"])
        if self.overwrite:
            return True
        networks = lora_extension()
        forbidden = {alias.lower() for alias in getattr(networks, "forbidden_network_aliases", ())}
        taken = {entry.lower() for entry in _known(networks)} | forbidden
        return name.lower() not in taken and not (lora_dir() / f"{name}{LORA}").exists()

    def publish(self, file: str, data: bytes, *, final: bool) -> Path:
        """A finished LoRA reaches the Lora folder when the WebUI's own loader knows all of its modules; else it stays
        in the run's folder. Raises OutputError."""
        # Late, so that start-up does not pay for diffusers and peft.
        from lora_trainer.training.output import DIFFUSERS_FILE

        mine = self.folder / file
        publish(data, mine)
        if not final or not file.endswith(LORA) or file == DIFFUSERS_FILE:
            return mine
        networks = lora_extension()
        if networks is not None:
            self._check(networks, mine)
        target = self._replace(self._place(networks, file), data)
        mine.unlink()
        if networks is not None:
            networks.update_available_networks_by_names([target.stem])
        return target

    def _place(self, networks: Any, file: str) -> Path:
        """In the Lora folder; what is to be overwritten may lie in a subfolder of it."""
        entry = getattr(networks, "available_networks", {}).get(Path(file).stem)
        there = Path(entry.filename) if entry is not None else None
        return there if self.overwrite and there is not None and there.is_file() else lora_dir() / file

    def _replace(self, target: Path, data: bytes) -> Path:
        """A file that Windows keeps locked, because it is loaded, stays; the new one gets another name."""
        try:
            publish(data, target)
            return target
        except OutputError as error:
            if not isinstance(error.__cause__, PermissionError) or not target.exists():
                raise
            stems = (f"{target.stem}-{n}" for n in itertools.count(2))
            other = next(p for p in (target.with_name(f"{stem}{LORA}") for stem in stems) if not p.exists())
            self.sink(Notice(text=f"{target.name} is in use and cannot be replaced: saved as {other.name}"))
            publish(data, other)
            return other

    def _check(self, networks: Any, file: Path) -> None:
        modules = {key.partition(".")[0] for key in read_header(file) if key != "__metadata__"}
        try:
            known = networks.load_network(file.stem, networks.network.NetworkOnDisk(file.stem, str(file))).modules
        except Exception as error:
            raise OutputError(f"{file}: kept there, because the WebUI's loader refuses it: {error}") from error
        if len(known) != len(modules):
            raise OutputError(
                f"{file}: kept there, because the WebUI's loader knows only {len(known)} of its {len(modules)} modules"
            )
        self.sink(Notice(text=f"checked with the WebUI's loader: {len(known)} of {len(modules)} modules apply"))


def lora_dir() -> Path:
    return Path(shared.cmd_opts.lora_dir)


def named_lora(text: str) -> str:
    """The file of the LoRA that prompts know by this name; a path stays as it is."""
    if not text or text != Path(text).name or "\\" in text or ":" in text:
        return text
    networks = lora_extension()
    for known in (getattr(networks, names, {}) for names in ("available_networks", "available_network_aliases")):
        entry = known.get(text.removesuffix(LORA))
        if entry is not None:
            return entry.filename
    return next((str(path) for path in lora_dir().rglob(f"*{LORA}") if path.stem == text.removesuffix(LORA)), text)


def _known(networks: Any) -> Iterator[str]:
    for names in ("available_networks", "available_network_aliases"):
        yield from getattr(networks, names, ())
