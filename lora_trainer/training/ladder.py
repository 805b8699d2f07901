"""What a run gives up when memory runs out, the cheapest thing first. What it computes stays the same, until nothing is
left but to store the base in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lora_trainer.config import Config
from lora_trainer.hosts.ports import nothing
from lora_trainer.models.storage import AUTO

NONE, MOST, ALL = range(3)
WORDS = ("no gradient checkpointing", "gradient checkpointing", "gradient checkpointing of all blocks")


@dataclass(frozen=True)
class Plan:
    """How a step is computed: with NONE, MOST or ALL blocks checkpointed, each batch in `parts` (their gradients add up
    to its own), the base in `storage` (`base_precision`)."""

    checkpointing: int
    parts: int = 1
    storage: str = AUTO

    @classmethod
    def of(cls, config: Config) -> Plan:
        return cls(MOST if config.gradient_checkpointing else NONE, storage=config.base_precision)

    def lighter(self, batch_size: int, storages: Callable[[str], Sequence[str]] = nothing) -> Plan | None:
        """The next rung down; None where there is none. `storages`: the host's, lighter than one."""
        if self.checkpointing < ALL:
            return replace(self, checkpointing=self.checkpointing + 1)
        if self.parts < batch_size:
            return replace(self, parts=min(2 * self.parts, batch_size))
        return self.stored_lighter(storages)

    def stored_lighter(self, storages: Callable[[str], Sequence[str]]) -> Plan | None:
        """The same with the base in the next lighter storage; None where there is none."""
        found = storages(self.storage)
        return replace(self, storage=found[0]) if found else None

    def __str__(self) -> str:
        parts = f", batches in {self.parts} parts" if self.parts > 1 else ""
        stored = f", the base in {self.storage}" if self.storage != AUTO else ""
        return f"{WORDS[self.checkpointing]}{parts}{stored}"
