"""A run goes on in the next process as if nothing had happened, or says why not."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from lora_trainer import files
from lora_trainer.cli import main
from lora_trainer.config import build
from lora_trainer.errors import ModelError, OutputError
from lora_trainer.events import Finished, Notice, Saved, StepDone, Validated
from lora_trainer.hosts.ports import Host
from lora_trainer.hosts.standalone import AloneLease, FileModels, FolderStore
from lora_trainer.jobs.control import JobControl
from lora_trainer.kernels.choose import Kernels
from lora_trainer.training import job as jobs
from lora_trainer.training import keeper, objectives, results
from lora_trainer.training.control import StopOnly
from lora_trainer.training.results import DivergedError
from lora_trainer.training.resume import ResumeError
from lora_trainer.training.run import run
from lora_trainer.training.states import FOLDER, StateFolder

ROOT = Path(__file__).parents[2]


class KilledError(BaseException):
    """Nothing of ours catches it, as nothing runs after a kill."""


class Run:
    """Runs of one config; `events` are of the last one."""

    def __init__(self, settings: dict) -> None:
        self.settings = settings | {"checkpoint_every": 2, "epochs": 2}
        self.events: list = []

    def __call__(self, *, control=None, at=None, resumes=True, **changes) -> bytes | None:
        """The published bytes. `at(event)` is called with each event."""
        config = build(self.settings, changes)
        self.events = []

        def sink(event) -> None:
            self.events.append(event)
            if at is not None:
                at(event)

        models = FileModels(Path(config.base_model), torch.device("cpu"), torch.float32, config.clip_skip)
        host = Host(models, AloneLease(), FolderStore(Path(config.output_dir), config.overwrite))
        finished = run(config, host, sink, clock=lambda: 1.7e9, control=control or StopOnly(), resumes=resumes)
        return Path(finished.output[0]).read_bytes() if finished.output else None

    def killed(self, at, **changes) -> None:
        """A run that dies when `at(event)` is true."""

        def check(event) -> None:
            if at(event):
                raise KilledError

        with pytest.raises(KilledError):
            self(at=check, **changes)

    def of(self, kind) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    def told(self, words: str) -> bool:
        return any(words in notice.text for notice in self.of(Notice))

    @property
    def out(self) -> Path:
        return Path(self.settings["output_dir"])


@pytest.fixture
def job(settings) -> Run:
    return Run(settings)


@pytest.fixture
def expected(settings, tmp_path) -> bytes:
    """The bytes of the undisturbed run."""
    other = Run(settings | {"output_dir": str(tmp_path / "undisturbed")})
    return other(output_dir=str(tmp_path / "undisturbed"))


def at_step(number: int):
    return lambda event: isinstance(event, StepDone) and event.step == number


# The header holds where the file was made only as a path, which is left out of it.
@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(job, expected, step):
    job.killed(at_step(step))
    assert job() == expected
    steps = [event.step for event in job.of(StepDone)]
    assert steps == list(range(steps[0], 7))
    assert steps[0] <= step
    # And once more: it is finished, and says the same.
    before = job.of(Finished)[0]
    assert job() == expected
    assert (job.of(StepDone), job.of(Finished)) == ([], [before])
    assert job.told("finished already")
    assert not list(job.out.rglob("*.tmp"))
    assert [p.name for p in (job.out / FOLDER / "tiny").iterdir()] == ["finished.json"]


@pytest.mark.parametrize("kind", ["ia3", "oft"])
def test_kinds_without_a_rank_go_on_too(job, settings, tmp_path, kind):
    changes = {"adapter": kind, "train_text_encoder": True, "module_dropout": 0.2}
    whole = Run(settings)(output_dir=str(tmp_path / "undisturbed"), **changes)
    job.killed(at_step(3), **changes)
    assert job(**changes) == whole


def test_validation_and_the_mean_loss_go_on_too(job, settings, tmp_path):
    held_out = {"validation_split": 0.2, "validate_every": 2, "epochs": 3}
    undisturbed = Run(settings)
    undisturbed(output_dir=str(tmp_path / "undisturbed"), **held_out)
    job.killed(at_step(5), **held_out)
    job(**held_out)
    (one,), (other,) = job.of(Finished), undisturbed.of(Finished)
    assert (one.loss, one.validation_base, one.validation_lora) == (
        other.loss,
        other.validation_base,
        other.validation_lora,
    )
    # The base is not measured again.
    assert min(event.step for event in job.of(Validated)) > 0


def test_a_stopped_run_saves_and_can_go_on(job, expected):
    asked = iter(range(1000))
    # It is asked once for each of the six images, then once before each step.
    job(control=StopOnly(lambda: next(asked) >= 6 + 3))
    assert (job.of(Finished)[0].state, job.of(Finished)[0].steps) == ("stopped", 3)
    assert job() == expected
    assert job.told("goes on from step 3")


def test_the_newest_state_that_is_whole_is_used(job, expected):
    job.killed(at_step(6))
    states = sorted((job.out / FOLDER / "tiny").glob("step*"))
    assert len(states) == 2
    data = bytearray(states[-1].read_bytes())
    data[-5] ^= 1
    states[-1].write_bytes(data)
    assert job() == expected
    assert job.told(f"{states[-1].name} is not whole")
    assert job.told("goes on from step 2")


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_cut_state_is_recognised(job, expected, cut):
    job.killed(at_step(5))
    for path in (job.out / FOLDER / "tiny").glob("step*"):
        path.write_bytes(path.read_bytes()[:cut])
    assert job() == expected
    assert job.told("it starts anew")


def test_it_says_when_there_is_nothing_to_go_on_with(job, expected):
    assert job() == expected
    assert job.told("has no run of tiny to go on with: it starts")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"learning_rate": 1e-3}, "learning_rate was 0.0005, now 0.001"), ({"lora_rank": 8}, "lora_rank was 4, now 8")],
)
def test_other_settings_are_refused(job, change, words):
    job.killed(at_step(5))
    with pytest.raises(ResumeError, match=words):
        job(**change)
    # And the run can still go on.
    assert job() is not None


def test_what_changes_nothing_learned_may_change(job, expected):
    job.killed(at_step(5))
    assert job(save_steps=1, checkpoint_every=1, log_with="csv") is not None
    assert job.of(StepDone)[0].step == 5
    longer = job(epochs=3)
    assert longer is not None
    assert job.told("finished already")


def test_other_pictures_or_another_model_are_refused(job, pictures, tmp_path, checkpoint):
    from safetensors.torch import load_file, save_file

    job.killed(at_step(5))
    state = load_file(checkpoint)
    name = next(name for name in state if name.startswith("model.diffusion_model"))
    state[name] = state[name] + 1
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="began with another model"):
        job(base_model=str(tmp_path / "other.safetensors"))
    captions = pictures / "metadata.csv"
    captions.write_text(captions.read_text(encoding="utf-8").replace("number 0", "number nought"), encoding="utf-8")
    with pytest.raises(ResumeError, match="pictures or captions have changed"):
        job()


def test_everything_may_have_moved(job, expected, tmp_path, checkpoint):
    job.killed(at_step(5))
    moved = tmp_path / "moved"
    job.out.rename(moved)
    Path(job.settings["train_data_dir"]).rename(tmp_path / "elsewhere")
    got = job(output_dir=str(moved), train_data_dir=str(tmp_path / "elsewhere"))
    assert weights(got) == weights(expected)


def test_without_resume_an_unfinished_run_is_kept(job, expected):
    job.killed(at_step(5))
    job(resumes=False)
    assert job.told("an unfinished run of tiny")
    assert Path(job.of(Finished)[0].output[0]).name == "tiny-2.safetensors"
    # Asked for the older of the two, it is still there.
    assert job(output_name="tiny") is not None
    assert {path.name for path in job.out.glob("*.safetensors")} >= {"tiny-2.safetensors"}


def test_overwrite_starts_anew(job, expected):
    job.killed(at_step(5))
    assert weights(job(resumes=False, overwrite=True)) == weights(expected)
    assert job.of(StepDone)[0].step == 1


def test_two_at_once_do_not_share_a_run(job):
    def second(event) -> None:
        if at_step(3)(event):
            other = Run(job.settings)
            other(resumes=False)
            assert Path(other.of(Finished)[0].output[0]).name == "tiny-2.safetensors"
            with pytest.raises(OutputError, match="another process is training this run"):
                Run(job.settings)(resumes=True, output_name="tiny")

    job(at=second, resumes=False)
    assert Path(job.of(Finished)[0].output[0]).name == "tiny.safetensors"


def test_a_state_that_cannot_be_written_does_not_end_the_run(job, expected, monkeypatch):
    rename = files._rename

    def full(source, target):
        if FOLDER in target.parts:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(files, "_rename", full)
    assert job() is not None
    assert job.told("no state to resume from, training goes on")
    assert not list(job.out.rglob("*.tmp"))


def test_a_run_that_could_not_be_saved_only_saves_when_it_goes_on(job, expected, monkeypatch, tmp_path):
    rename = files._rename

    def full(source, target):
        if target == job.out / "tiny.safetensors":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(files, "_rename", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OutputError, match="the disk is full.*--resume"):
        job()
    (rescued,) = tmp_path.glob("lora-trainer-*/tiny.safetensors")
    assert rescued.read_bytes() == expected
    monkeypatch.undo()
    assert job() == expected
    assert job.of(StepDone) == []


def test_the_log_goes_on(settings, capsys, monkeypatch):
    arguments = ["train", *(f"{k}={v}" for k, v in settings.items()), "checkpoint_every=2"]
    written = StateFolder._write
    monkeypatch.setattr(StateFolder, "_write", lambda *a: written(*a) or (_ for _ in ()).throw(KilledError))
    with pytest.raises(KilledError):
        main(arguments)
    monkeypatch.undo()
    assert main([*arguments, "--resume"]) == 0
    with (Path(settings["output_dir"]) / "logs" / "steps.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file)]
    assert steps == [str(number) for number in range(1, 7)]


def test_a_pause_leaves_a_usable_lora_and_the_run_goes_on(job, expected):
    control = JobControl()
    seen = []

    def entered(paused: bool) -> None:
        if paused:
            seen.extend(event.path for event in job.of(Saved))
            threading.Timer(0.05, control.go_on).start()

    control.entered = entered
    assert job(control=control, at=lambda event: at_step(4)(event) and control.pause()) == expected
    assert [Path(path).name for path in seen] == ["tiny-step00000004.safetensors"]
    assert [event.step for event in job.of(StepDone)] == list(range(1, 7))


def test_a_pause_while_preparing(job, expected):
    control = JobControl(lambda paused: paused and threading.Timer(0.05, control.go_on).start())
    assert job(control=control, at=lambda event: event == job.events[0] and control.pause()) == expected


def nan_from(monkeypatch, bad) -> None:
    """Losses of training steps are not finite where `bad(number of the call)`."""
    calls = []

    def sometimes(*args, **kwargs):
        losses = objectives.mse(*args, **kwargs)
        if not torch.is_grad_enabled():
            return losses
        calls.append(1)
        return losses * math.nan if bad(len(calls)) else losses

    monkeypatch.setattr("lora_trainer.training.segment.objective_of", lambda *_: sometimes)
    monkeypatch.setattr(results, "MAX_BAD_STEPS", 3)


def test_bad_numbers_in_a_row_lead_back_with_a_smaller_learning_rate(job, monkeypatch):
    nan_from(monkeypatch, lambda call: 5 <= call <= 7)
    job(epochs=4)
    steps = job.of(StepDone)
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6, *range(5, 13)]
    assert {event.learning_rate for event in steps[:6]} == {5e-4}
    assert {event.learning_rate for event in steps[6:]} == {2.5e-4}
    assert job.told("3 updates in a row were not finite; back to step 4, on with learning rate 0.00025")


def test_the_smaller_learning_rate_is_remembered(job, monkeypatch):
    nan_from(monkeypatch, lambda call: 5 <= call <= 7)
    job.killed(lambda event: at_step(9)(event), epochs=4)
    monkeypatch.undo()
    job(epochs=4)
    assert {event.learning_rate for event in job.of(StepDone)} == {2.5e-4}


def test_numbers_that_stay_bad_end_with_advice_and_what_was_learned(job, monkeypatch):
    nan_from(monkeypatch, lambda call: call >= 5)
    with pytest.raises(DivergedError, match="3 updates in a row.*Lower learning_rate"):
        job(epochs=4)
    assert sum("back to step 4" in notice.text for notice in job.of(Notice)) == keeper.ROLLBACKS
    (saved,) = job.of(Saved)
    assert Path(saved.path).exists()


def test_kill_in_a_real_process(settings):
    """SIGKILL, then --resume on the command line."""
    command = [sys.executable, "-m", "lora_trainer.cli", "train", "checkpoint_every=5", "epochs=40"]
    command += [f"{key}={value}" for key, value in settings.items() if key != "epochs"]
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    states = Path(settings["output_dir"]) / FOLDER / "tiny"
    deadline = time.monotonic() + 60
    while not list(states.glob("step*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = subprocess.run([*command, "--resume", "--json"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "goes on from step" in again.stderr
    assert json.loads(again.stdout)["steps"] == 120


def weights(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.mark.parametrize(
    "place",
    [
        "lora_trainer.training.segment.inject",
        "lora_trainer.training.job.Segment.snapshot",
        "lora_trainer.training.output.Output.save",
        "lora_trainer.training.step.ForwardBackward.__call__",
        "lora_trainer.training.step.Update.__call__",
    ],
)
def test_memory_that_runs_out_anywhere_costs_no_step(job, expected, monkeypatch, place):
    """Once, wherever it is asked for: the run goes on a rung lower and ends the same."""
    *_, owner, name = place.split(".")
    target = __import__(place.rsplit(".", 1)[0], fromlist=["x"]) if owner[0].islower() else None
    if target is None:
        target = getattr(__import__(place.rsplit(".", 2)[0], fromlist=["x"]), owner)
    real, calls = getattr(target, name), []

    def short(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 - (owner == "segment"):
            raise torch.cuda.OutOfMemoryError("simulated")
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, short)
    got = job(save_steps=4)
    assert job.told("out of memory, goes on with gradient checkpointing")
    assert weights(got) == weights(expected)


def test_a_validation_that_does_not_fit_is_made_in_smaller_batches(job, monkeypatch):
    from lora_trainer.training.validation import Validator

    loss = Validator.loss
    sizes: list[int] = []

    def short(self, network):
        sizes.append(self.batch_size)
        if self.batch_size > fits:
            raise torch.cuda.OutOfMemoryError("simulated")
        return loss(self, network)

    monkeypatch.setattr(Validator, "loss", short)
    fits = 4
    job(validation_split=0.2, epochs=1)
    # The held-out picture, then a training one; what did not fit once is not tried again.
    assert sizes == [16, 8, 4, 4, 4, 4]
    assert len(job.of(Validated)) == 2
    fits = 0
    job(validation_split=0.2, epochs=1, overwrite=True, resumes=False)
    assert job.told("not validated, it does not fit")
    assert job.of(Finished)[0].state == "done"


def test_a_picture_that_the_gpu_cannot_encode_is_encoded_on_the_cpu(job, expected, monkeypatch):
    from lora_trainer.models import latents

    real = latents._posterior
    views: list = []

    def short(vae, pixels):
        views.append(vae)
        if len(views) % 2:
            raise torch.cuda.OutOfMemoryError("simulated")
        return real(vae, pixels)

    monkeypatch.setattr(latents, "_posterior", short)
    assert job() == expected
    assert all(copy is not view for view, copy in zip(views[::2], views[1::2], strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_nonsense_is_never_published(job, monkeypatch, value):
    from lora_trainer.adapters import parts

    real = parts.to_kohya
    monkeypatch.setattr(
        parts,
        "to_kohya",
        lambda *a, **k: {name: tensor * value if tensor.dim() else tensor for name, tensor in real(*a, **k).items()},
    )
    with pytest.raises(OutputError, match="not written: .*(not finite|nothing was learned)"):
        job(save_steps=2)
    assert not list(job.out.rglob("*tiny*.safetensors"))
    # Its steps are not lost.
    monkeypatch.undo()
    assert job() is not None
    assert job.of(StepDone) == []


def test_weights_that_the_files_precision_cannot_hold_are_in_fp32(job, monkeypatch):
    from lora_trainer.adapters import parts
    from lora_trainer.adapters.load import read_lora

    real = parts.to_kohya
    monkeypatch.setattr(
        parts,
        "to_kohya",
        lambda *a, **k: {name: tensor * 1e9 if tensor.dim() else tensor for name, tensor in real(*a, **k).items()},
    )
    job()
    assert job.told("too large for fp16")
    factors = read_lora(Path(job.of(Finished)[0].output[0])).factors
    assert max(f.down.abs().max() for f in factors.values()) > 1e6


def test_a_folder_that_moves_away_in_the_middle_is_made_again(job, expected, tmp_path):
    moved = tmp_path / "moved away"
    job(at=lambda event: at_step(4)(event) and job.out.rename(moved), save_steps=5)
    assert weights((job.out / "tiny.safetensors").read_bytes()) == weights(expected)
    assert list(moved.rglob("step*.safetensors"))


def test_a_slow_disk_holds_up_no_step(job, monkeypatch):
    """States are written behind the steps' back; one that is still on its way is not waited for."""
    flush, written = files._flush, []

    def slow(file):
        if FOLDER in Path(file.name).parts:
            written.append(file.name)
            time.sleep(1.0)
        flush(file)

    monkeypatch.setattr(files, "_flush", slow)
    took: list[float] = []
    job(checkpoint_every=1, epochs=8, at=lambda event: isinstance(event, StepDone) and took.append(time.monotonic()))
    gaps = [after - before for before, after in itertools.pairwise(took)]
    assert max(gaps) < 0.9
    assert len(written) < 8


@pytest.mark.parametrize("name", ["лора", "画风", "ليلى", "é" * 75, "a b.c-d_e (1)"])
def test_names_in_any_script(job, name):
    job(output_name=name)
    assert (job.out / f"{name}.safetensors").exists()
    assert not list(job.out.rglob("*.tmp"))


def test_it_stays_on_the_kernels_it_began_with(job, expected, monkeypatch):
    made = []
    monkeypatch.setattr(jobs, "Kernels", lambda *given: made.append(given) or Kernels(*given))
    job.killed(at_step(5))
    assert weights(job()) == weights(expected)
    assert made == [("auto", ""), ("auto", "plain torch")]


def test_an_update_that_brings_a_setting_ends_no_run(job, expected, monkeypatch):
    from lora_trainer.training import job as jobs

    asdict = jobs.msgspec.structs.asdict
    older = lambda config: {key: value for key, value in asdict(config).items() if key != "train_text_encoder"}  # noqa: E731
    monkeypatch.setattr(jobs.msgspec.structs, "asdict", older)
    job.killed(at_step(5))
    monkeypatch.undo()
    assert job() == expected
