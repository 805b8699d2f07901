"""What a run gives up when memory runs out, the cheapest thing first; what it computes stays the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_trainer.config import Config

NONE, MOST, ALL = range(3)
WORDS = ("no gradient checkpointing", "gradient checkpointing", "gradient checkpointing of all blocks")


@dataclass(frozen=True)
class Plan:
    """How a step is computed: with NONE, MOST or ALL blocks checkpointed, each batch in `parts` (their gradients add up
    to its own)."""

    checkpointing: int
    parts: int = 1

    @classmethod
    def of(cls, config: Config) -> Plan:
        return cls(MOST if config.gradient_checkpointing else NONE)

    def lighter(self, batch_size: int) -> Plan | None:
        """The next rung down; None where there is none."""
        if self.checkpointing < ALL:
            return replace(self, checkpointing=self.checkpointing + 1)
        if self.parts < batch_size:
            return replace(self, parts=min(2 * self.parts, batch_size))
        return None

    def __str__(self) -> str:
        checkpointing = WORDS[self.checkpointing]
        return checkpointing if self.parts == 1 else f"{checkpointing}, batches in {self.parts} parts"
