"""Runs one of kohya's scripts as `python SCRIPT ARGS...` would, and writes what its steps took to RECORD.

    python -m benchmarks.kohya_probe RECORD PROFILED SCRIPT ARGS...

None of kohya's files is changed. Its loop shows the loss on a progress bar once a step, right after it has waited
for that loss: the moments are taken there. Steps after the first that `PROFILED` steps before the end are left out of
the times, since the profiler watches them.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile
from tqdm import tqdm

from benchmarks import timing

BAR = "steps"
# Not among kohya's requirements, but taken up by its older diffusers wherever they happen to be installed.
FOREIGN = ("peft",)


class Probe:
    """Collects the moment of each step from the progress bar.

    `stamps`: seconds of a clock that counts on between processes of one machine; `first_at`: Unix time.
    """

    def __init__(self, profiled: int) -> None:
        self.profiled = profiled if torch.cuda.is_available() else 0
        self.stamps: list[float] = []
        self.first_at = 0.0
        self.whole_run_peak = 0
        self.profiler: profile | None = None
        self.busy_ms: float | None = None

    def step(self, bar: tqdm) -> None:
        """A step has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        count = len(self.stamps)
        if count == 1:
            self.first_at = time.time()
            # Encoding the pictures ahead is not training: count what is reserved from here on.
            self.whole_run_peak = timing.peak_reserved() or 0
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        if self.profiled and count == bar.total - self.profiled:
            self.profiler = timing.profiler()
            self.profiler.start()
        elif self.profiler and count == bar.total:
            self.profiler.stop()
            self.busy_ms = timing.busy_ms(self.profiler) / self.profiled

    def record(self) -> dict[str, Any]:
        """What was seen; the profiled steps' moments are left out."""
        peak = timing.peak_reserved()
        return {
            "stamps": self.stamps[: len(self.stamps) - self.profiled],
            "first_at": self.first_at,
            "gpu_busy_ms": self.busy_ms,
            "peak_reserved_bytes": peak,
            "whole_run_peak_reserved_bytes": None if peak is None else max(peak, self.whole_run_peak),
            **timing.machine(),
        }


def watch(probe: Probe) -> None:
    """Have the progress bar of the training loop report to `probe`."""
    shown = tqdm.set_postfix

    def set_postfix(bar: tqdm, *args: Any, **kwargs: Any) -> None:
        if bar.desc.removesuffix(": ") == BAR:
            probe.step(bar)
        shown(bar, *args, **kwargs)

    tqdm.set_postfix = set_postfix


def main() -> None:
    """Run the script in this process under the probe."""
    record, profiled, script, *arguments = sys.argv[1:]
    for name in FOREIGN:
        # What the import system takes for "there is no such package".
        sys.modules[name] = None
    probe = Probe(int(profiled))
    watch(probe)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        Path(record).write_text(json.dumps(probe.record()))


if __name__ == "__main__":
    main()
