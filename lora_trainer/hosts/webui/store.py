"""Where a run in the WebUI puts its files: the finished LoRA among the WebUI's own, all else in the run's folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modules import shared

from lora_trainer.adapters.writer import publish
from lora_trainer.errors import ConfigError, OutputError
from lora_trainer.events import EventSink, Notice
from lora_trainer.hosts.webui.merged import lora_extension
from lora_trainer.models.checkpoint import read_header

LORA = ".safetensors"
PREFERRED_WEIGHT = 0.8


@dataclass(frozen=True)
class LoraFolder:
    """A LoraStore over `--lora-dir` and the run's own `folder`."""

    folder: Path
    overwrite: bool
    trigger_words: str
    sink: EventSink

    def claim(self, name: str) -> str:
        """Names are global: over all subfolders, and the names that files give themselves."""
        networks = lora_extension()
        forbidden = {"none", "addams", *(alias.lower() for alias in getattr(networks, "forbidden_network_aliases", ()))}
        if name.lower() in {"none", "addams"}:
            raise ConfigError([f"output_name: the WebUI's prompts give {name!r} another meaning; choose another name"])
        if self.overwrite:
            return name
        taken = {entry.lower() for entry in _known(networks)} | forbidden
        numbered = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
        return next(n for n in numbered if n.lower() not in taken and not (lora_dir() / f"{n}{LORA}").exists())

    def publish(self, file: str, data: bytes, *, final: bool) -> Path:
        """A finished LoRA is taken back when the WebUI's own loader does not know all of its tensors."""
        if not final or not file.endswith(LORA) or "/" in file:
            target = self.folder / file
            publish(data, target)
            return target
        target = self._replace(lora_dir() / file, data)
        networks = lora_extension()
        if networks is not None:
            self._check(networks, target)
            networks.update_available_networks_by_names([target.stem])
        self._card(target)
        return target

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

    def _check(self, networks: object, target: Path) -> None:
        modules = {key.rpartition(".lora_")[0] for key in read_header(target) if ".lora_" in key}
        try:
            entry = networks.network.NetworkOnDisk(target.stem, str(target))
            known = networks.load_network(target.stem, entry).modules
        except Exception as error:
            target.unlink()
            raise OutputError(f"{target}: the WebUI's loader refuses it ({error}); it is taken back") from error
        if len(known) != len(modules):
            target.unlink()
            raise OutputError(
                f"{target}: the WebUI's loader knows {len(known)} of its {len(modules)} modules; it is taken back"
            )
        self.sink(Notice(text=f"checked with the WebUI's loader: {len(known)} of {len(modules)} modules apply"))

    def _card(self, target: Path) -> None:
        """What the card of the LoRA shows and puts into the prompt. The user's own edits stay."""
        card = target.with_suffix(".json")
        if card.exists():
            return
        values = {
            "description": "Trained with LoRA Trainer.",
            "sd version": "SD1",
            "activation text": self.trigger_words,
            "preferred weight": PREFERRED_WEIGHT,
        }
        publish(json.dumps(values, indent=4, ensure_ascii=False).encode(), card)


def lora_dir() -> Path:
    return Path(shared.cmd_opts.lora_dir)


def _known(networks: object | None) -> Iterator[str]:
    for names in ("available_networks", "available_network_aliases"):
        yield from getattr(networks, names, ())
