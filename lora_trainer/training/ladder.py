"""What a run gives up when memory runs out, the cheapest thing first; what it computes stays the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_trainer.config import Config


@dataclass(frozen=True)
class Plan:
    """How a step is computed: with checkpointed blocks, each batch in `parts` (their gradients add up to its own)."""

    checkpointing: bool
    parts: int = 1

    @classmethod
    def of(cls, config: Config) -> Plan:
        return cls(config.gradient_checkpointing)

    def lighter(self, batch_size: int) -> Plan | None:
        """The next rung down; None where there is none."""
        if not self.checkpointing:
            return replace(self, checkpointing=True)
        if self.parts < batch_size:
            return replace(self, parts=min(2 * self.parts, batch_size))
        return None

    def __str__(self) -> str:
        checkpointing = "gradient checkpointing" if self.checkpointing else "no gradient checkpointing"
        return checkpointing if self.parts == 1 else f"{checkpointing}, batches in {self.parts} parts"
