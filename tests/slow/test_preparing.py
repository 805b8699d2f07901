"""Preparing costs little more than Pillow's own work, goes on where it was interrupted, and need not be repeated."""

from __future__ import annotations

import pytest

from benchmarks.preparing import main


@pytest.mark.slow
def test_preparing_takes_little_more_than_decoding_and_resizing():
    found = main(["--images", "1000"])
    # On the clock, or of the processor where others use it meanwhile.
    assert min(found["ratio"], found["cpu_ratio"]) <= 1.15
    assert found["interrupted_after"] == 333
    assert found["then_encoded"] == 667
    assert found["second_run_encoded"] == 0
    assert min(found["second_run_s"], found["second_run_cpu_s"]) < 3
