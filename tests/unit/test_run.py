"""Whole runs on a tiny model: the bytes they write, and what must not change them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lora_trainer import files
from lora_trainer.adapters.load import read_lora
from lora_trainer.cli import main
from lora_trainer.config import build
from lora_trainer.errors import OutputError
from lora_trainer.events import Finished, Notice, Saved, Started, StepDone, Validated
from lora_trainer.hosts.ports import Host
from lora_trainer.hosts.standalone import AloneLease, FileModels, FolderStore
from lora_trainer.training import objectives, results
from lora_trainer.training.control import StopOnly
from lora_trainer.training.results import DivergedError
from lora_trainer.training.run import run

ROOT = Path(__file__).parents[2]


def train(settings, *, lease=None, stop=lambda: False, models=None, resumes=False, **changes):
    """(events, bytes of the published file or None) of a run."""
    config = build(settings, changes)
    events: list = []
    host = Host(
        models or FileModels(Path(config.base_model), torch.device("cpu"), torch.float32),
        lease or AloneLease(),
        FolderStore(Path(config.output_dir), overwrite=True),
    )
    finished = run(config, host, events.append, clock=lambda: 1.7e9, control=StopOnly(stop), resumes=resumes)
    assert finished == of(events, Finished)[-1]
    return events, Path(finished.output[0]).read_bytes() if finished.output else None


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_two_processes_write_the_same_bytes(settings, tmp_path):
    files = []
    for n in (1, 2):
        out = tmp_path / f"process{n}"
        arguments = [f"{k}={v}" for k, v in {**settings, "output_dir": "out"}.items()]
        environment = {
            **os.environ,
            "SOURCE_DATE_EPOCH": "1700000000",
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": str(n),
        }
        out.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "lora_trainer.cli", "train", *arguments],
            cwd=out,
            env=environment,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode()
        files.append((out / "out" / "tiny.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_segment_ends_and_the_next_goes_on_as_if_nothing_had_happened(settings):
    class Interrupted(AloneLease):
        asked = 0

        def hand_over(self, make_room=None):
            self.asked += 1
            return self.asked % 2 == 1

    class Counted(FileModels):
        borrowed = 0

        @contextmanager
        def borrow(self, storage=None):
            self.borrowed += 1
            with super().borrow(storage) as model:
                yield model

    _, expected = train(settings)
    models = Counted(Path(settings["base_model"]), torch.device("cpu"), torch.float32)
    events, interrupted = train(settings, lease=Interrupted(), models=models)
    assert models.borrowed == 9  # given back before each image but the first, and after the 1st, 3rd and 5th step
    assert [e.step for e in of(events, StepDone)] == list(range(1, 7))
    assert interrupted == expected


def test_only_the_lora_trains_and_the_base_is_untouched(settings):
    models = FileModels(Path(settings["base_model"]), torch.device("cpu"), torch.float32)
    with models.borrow():
        _, state, _ = models._state

    def digest():
        whole = hashlib.sha256()
        for name in sorted(state):
            whole.update(state[name].numpy().tobytes())
        return whole.hexdigest()

    before, rng = digest(), torch.get_rng_state()
    train(settings, models=models, gradient_checkpointing=True)
    assert digest() == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in state.values())
    with models.borrow() as model:
        assert not any(module._forward_hooks for module in model.unet.modules())


def test_gradient_checkpointing_changes_no_bit_of_the_weights(settings):
    _, plain = train(settings)
    _, checkpointed = train(settings, gradient_checkpointing=True)
    assert weights(plain) == weights(checkpointed)


def test_batch_and_accumulation_are_the_same_mathematics(settings):
    """An update over the whole epoch is the same however it is cut: 6 = 3 x 2 = 1 x 6, dropout and padding too."""
    whole = []
    for size, accumulation in ((6, 1), (4, 2), (3, 2), (1, 6)):
        events, _ = train(settings, batch_size=size, gradient_accumulation_steps=accumulation, resolution=64, epochs=1)
        (step,) = of(events, StepDone)
        whole.append(step)
    assert all(abs(step.loss - whole[0].loss) < 1e-5 for step in whole)
    assert all(abs(step.grad_norm - whole[0].grad_norm) < 1e-4 * whole[0].grad_norm for step in whole)


def test_it_learns_and_says_what_it_does(settings):
    events, _ = train(
        settings, epochs=30, learning_rate=5e-3, lora_dropout=0.0, validation_split=0.2, validate_every=20
    )
    (started,) = of(events, Started)
    assert (started.images, started.effective_batch, started.scale) == (5, 2, 2.0)
    losses = [event.loss for event in of(events, StepDone)]
    assert sum(losses[-9:]) < 0.98 * sum(losses[:9])
    validated = of(events, Validated)
    assert [v.step for v in validated[:2]] == [0, 20]
    assert validated[0].lora == validated[0].base == validated[-1].base


def test_stop_saves_what_was_learned(settings):
    asked = iter(range(1000))
    # It is asked once for each of the six images, then once before each step.
    events, data = train(settings, epochs=50, stop=lambda: next(asked) >= 6 + 3)
    finished = of(events, Finished)[0]
    assert (finished.state, finished.steps) == ("stopped", 3)
    assert any(f.up.any() for f in lora_of(data, settings).values())


def test_stop_while_preparing_publishes_nothing(settings):
    events, data = train(settings, stop=lambda: True)
    assert of(events, Finished)[0].state == "stopped"
    assert data is None
    assert not of(events, Saved)


def test_a_bad_step_is_left_out_and_too_many_end_the_run(settings, monkeypatch):
    calls = []

    def sometimes_nan(*args, **kwargs):
        calls.append(1)
        losses = objectives.mse(*args, **kwargs)
        return losses * float("nan") if torch.is_grad_enabled() and bad(len(calls)) else losses

    monkeypatch.setattr("lora_trainer.training.segment.objective_of", lambda *_: sometimes_nan)
    bad = lambda call: call in (6, 7)  # noqa: E731
    events, data = train(settings)
    steps = of(events, StepDone)
    assert any(step.loss != step.loss for step in steps)
    assert any("not finite" in notice.text for notice in of(events, Notice))
    assert all(torch.isfinite(f.up).all() for f in lora_of(data, settings).values())
    bad = lambda call: True  # noqa: E731
    monkeypatch.setattr(results, "MAX_BAD_STEPS", 3)
    with pytest.raises(DivergedError, match="3 updates in a row.*learning_rate"):
        train(settings)


def test_the_file_repeats_its_run(settings, tmp_path):
    _, first = train(settings)
    lora = tmp_path / "first.safetensors"
    lora.write_bytes(first)
    from lora_trainer.config.sources import read_file

    needed = {key: settings[key] for key in ("base_model", "train_data_dir", "output_dir")}
    _, second = train(read_file(lora) | needed)
    assert second == first


def test_base_file_may_be_truncated_or_replaced_during_a_run(settings, tmp_path):
    base = tmp_path / "base.safetensors"
    base.write_bytes(Path(settings["base_model"]).read_bytes())
    _, expected = train(settings, base_model=str(base))

    class Truncating(AloneLease):
        def hand_over(self, make_room=None):
            base.write_bytes(b"gone")
            return True

    _, got = train(settings, base_model=str(base), lease=Truncating())
    assert weights(got) == weights(expected)


def test_a_full_disk_leaves_nothing_half_written(settings, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match=r"tiny\.safetensors: not written: the disk is full"):
        train(settings)
    assert list(Path(settings["output_dir"]).rglob("*")) == []


def test_a_lora_of_the_same_name_is_kept(settings):
    assert main(["train", *(f"{k}={v}" for k, v in settings.items())]) == 0
    assert main(["train", *(f"{k}={v}" for k, v in settings.items())]) == 0
    assert {p.name for p in Path(settings["output_dir"]).glob("*.safetensors")} == {
        "tiny.safetensors",
        "tiny-2.safetensors",
    }


def lora_of(data, settings):
    path = Path(settings["output_dir"]) / "read.safetensors"
    path.write_bytes(data)
    return read_lora(path).factors


def weights(data: bytes) -> bytes:
    """The tensors of a file: all that follows its header."""
    return data[8 + int.from_bytes(data[:8], "little") :]
