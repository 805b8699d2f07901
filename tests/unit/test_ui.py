"""The tab: its controls and settings, a job as HTML, the events, and the Blocks where gradio is installed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_trainer.config.build import build as build_config
from lora_trainer.config.options import options
from lora_trainer.config.schema import GROUPS
from lora_trainer.curve import Point
from lora_trainer.doctor import Finding, Report
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.ui import doctor, fields, live
from lora_trainer.ui.chart import MAX_POINTS, curve, judged, smooth
from lora_trainer.ui.handlers import Handlers
from lora_trainer.ui.judgement import judgement
from lora_trainer.ui.ports import Checkpoint
from lora_trainer.ui.screen import look, shown_job
from lora_trainer.ui.words import advice, duration, memory, step_time

EVIL = "<img src=x onerror=alert(1)>&\"'"
IDLE = {
    "id": "j1",
    "name": "style",
    "state": "queued",
    "created": 1.0,
    "started": None,
    "finished": None,
    "stage": "waiting",
    "step": 0,
    "steps": None,
    "epoch": None,
    "epochs": None,
    "loss": None,
    "learning_rate": None,
    "seconds_per_step": None,
    "losses": (),
    "validations": (),
    "comparisons": (),
    "kind": "train",
    "sweep": (),
    "suggested": None,
    "why": None,
    "eta": None,
    "memory": None,
    "available": None,
    "log": (),
    "output": (),
    "error": None,
    "details": None,
    "settings": {},
}
HALFWAY = {
    "state": "training",
    "stage": "training",
    "started": 10.0,
    "step": 120,
    "steps": 240,
    "epoch": 5,
    "epochs": 10,
    "loss": 0.1,
    "learning_rate": 2e-4,
    "seconds_per_step": 0.186,
    "losses": tuple((step, 0.2 - step / 2000) for step in range(1, 121)),
    "validations": (Point(0, 0.2, 0.2, 0.1, 0.1), Point(100, 0.2, 0.15, 0.05, 0.1)),
    "comparisons": ((0, 0.0, 0.0, 0.0), (100, 0.4, 0.02, 0.33)),
    "eta": 754.0,
    "memory": 6 * 1024**3,
    "log": ("started", "step 100"),
}


def job(**changes: object) -> SimpleNamespace:
    assert set(changes) <= set(IDLE)
    return SimpleNamespace(**(IDLE | changes))


class FakeJobs:
    def __init__(self, *jobs: SimpleNamespace) -> None:
        self.list, self.stopped, self.paused, self.continued = list(jobs), [], [], []

    def pause(self, id: str) -> None:
        self.paused.append(id)
        self.job(id).state = "paused"

    def go_on(self, id: str) -> None:
        self.continued.append(id)
        self.job(id).state = "queued"

    def jobs(self) -> list[SimpleNamespace]:
        return self.list

    def job(self, id: str) -> SimpleNamespace:
        for one in self.list:
            if one.id == id:
                return one
        raise DataError(f"{id}: no such job")

    def stop(self, id: str) -> SimpleNamespace:
        self.stopped.append(id)
        return self.job(id)


@dataclass
class FakeHost:
    jobs: FakeJobs = field(default_factory=FakeJobs)
    folder: Path | None = None
    model: Checkpoint | None = None
    submitted: list[dict[str, object]] = field(default_factory=list)
    asked: int = 0
    infotext: str | None = None
    bound: list[tuple[object, object]] = field(default_factory=list)
    checked: list[dict[str, object]] = field(default_factory=list)
    report: Report | None = None
    editor_pass: str = "open <sesame>"

    def checkpoint(self) -> Checkpoint | None:
        self.asked += 1
        return self.model

    def submit(self, settings: dict[str, object]) -> SimpleNamespace:
        build_config({**settings, "base_model": "base", "output_dir": "out"})
        self.submitted.append(settings)
        self.jobs.list.insert(0, job(id=f"j{len(self.jobs.list) + 1}"))
        return self.jobs.list[0]

    def find_rate(self, settings: dict[str, object]) -> SimpleNamespace:
        self.submit(settings)
        self.jobs.list[0].kind = "find-lr"
        return self.jobs.list[0]

    def check(self, settings: dict[str, object]) -> Report:
        self.checked.append(settings)
        if not settings["train_data_dir"]:
            raise DataError(f"{EVIL}: no such folder")
        return self.report

    def upload_folder(self) -> Path:
        assert self.folder is not None
        self.folder.mkdir()
        return self.folder

    def prompt(self, job: SimpleNamespace, weight: float = 0.8) -> str:
        return f"mystyle <lora:{job.name}:{weight:g}>"

    def grid(self, job: SimpleNamespace) -> str | None:
        return self.infotext

    def send_to_txt2img(self, button: object, text: object) -> None:
        self.bound.append((button, text))


def changes(**values: object) -> dict[str, object]:
    """Stands in for gr.update."""
    return values


def page(host: FakeHost, answer: list[object]) -> dict[str, object]:
    return dict(zip(Handlers.SCREEN, answer[-len(Handlers.SCREEN) :], strict=True))


def defaults() -> dict[str, object]:
    return {option.key: fields.initial(option) for option in fields.shown()}


class Wellformed(HTMLParser):
    """Fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# Controls


def test_every_option_is_shown_once_or_hidden_for_a_reason():
    shown = [option.key for option in fields.shown()]
    assert len(shown) == len(set(shown))
    assert set(shown).isdisjoint(fields.HIDDEN)
    assert set(shown) | set(fields.HIDDEN) == set(options())
    assert set(fields.HIDDEN) == {
        "base_model",
        "base_precision",
        "output_dir",
        "cache_dir",
        "device",
        "cpu_threads",
        "trial",
        "enable_xformers",
        "optimizer_class",
    }
    assert list(fields.groups()) == list(GROUPS)


def test_words_of_the_page_belong_to_options():
    for table in (fields._LABELS, fields._HELP, fields._PLACEHOLDERS, fields._AUTOMATIC):
        assert set(table) <= set(options())
    labels = [fields.label(option.key) for option in fields.shown()]
    assert len(labels) == len(set(labels))
    assert not any("_" in label for label in labels)


def test_kinds_of_controls():
    kinds = {option.key: fields.control(option) for option in options().values()}
    assert kinds["overwrite"] == "checkbox"
    assert kinds["lr_scheduler"] == "dropdown"
    assert kinds["lora_rank"] == kinds["learning_rate"] == "number"
    assert kinds["sample_prompts"] == "lines"
    # gradio 3 shows 0 for an empty number
    assert kinds["resolution"] == kinds["lora_alpha"] == kinds["metadata_path"] == "text"


def test_strides_fit_the_size_of_the_value():
    assert fields.stride(options()["learning_rate"]) == pytest.approx(1e-4)
    assert fields.stride(options()["epochs"]) == 1
    assert fields.stride(options()["validation_split"]) == pytest.approx(0.1)


def test_untouched_controls_mean_the_defaults():
    made = fields.settings(defaults() | {"train_data_dir": "pictures"})
    host = {"base_model": "base", "output_dir": "out"}
    assert build_config(made, host) == build_config({"train_data_dir": "pictures"}, host)


def test_what_browsers_send_becomes_settings():
    found = fields.settings(
        {
            "train_data_dir": ' "C:\\My pictures" ',
            "lora_rank": 16.0,
            "batch_size": None,
            "resolution": " 768 ",
            "lora_alpha": "  ",
            "output_name": "",
            "trigger_words": " my style ",
            "sample_prompts": "a cat, sitting\n\n  a dog\r\n",
            "target_modules": "",
            "overwrite": True,
        }
    )
    assert found == {
        "train_data_dir": "C:\\My pictures",
        "lora_rank": 16.0,
        "batch_size": None,
        "resolution": "768",
        "trigger_words": "my style",
        "sample_prompts": ["a cat, sitting", "a dog"],
        "target_modules": [],
        "overwrite": True,
    }
    with pytest.raises(ConfigError) as error:
        build_config(found, {"base_model": "base"})
    assert [line.split(":")[0] for line in error.value.problems] == ["target_modules", "batch_size"]


# A job as HTML


@pytest.mark.parametrize("state", live.STATES)
def test_a_job_in_every_state_is_escaped_and_well_formed(state: str):
    texts = {"name": EVIL, "id": EVIL, "stage": EVIL, "log": (EVIL,), "error": f"lora_rank: {EVIL}\n{EVIL}"}
    shown = job(**(HALFWAY | texts | {"state": state, "output": (f"/{EVIL}.safetensors",)}))
    host = FakeHost(FakeJobs(shown), model=Checkpoint(EVIL, (EVIL,)))
    screen = look(host)
    result = screen.result.file if screen.result else ""
    for html in (screen.checkpoint, screen.panel, screen.log, screen.jobs, result, live.note(EVIL, [EVIL])):
        assert "img" not in Wellformed(html).seen
    for html in (screen.checkpoint, screen.panel, screen.log, screen.jobs):
        assert "&lt;img" in html
    assert live.STATES[state] in screen.panel


def test_the_panel_says_how_far_it_is():
    html = live.panel(job(**HALFWAY))
    for words in ("Step 120 of 240", "epoch 5 of 10", "13 min left", "186 ms", "6.0 GiB", "0.0002", "-25%"):
        assert words in html
    assert 'style="width:50.0%"' in html
    assert 'aria-valuenow="50"' in html
    assert html.count("<polyline") == 2 + 3


def test_epochs_that_will_not_be_reached_are_not_promised():
    assert "epoch 5 of 10" in live.panel(job(**HALFWAY))
    html = live.panel(job(**HALFWAY | {"settings": {"max_train_steps": 240}}))
    assert "epoch 5" in html
    assert "of 10" not in html


def test_a_job_that_knows_nothing_yet_shows_no_numbers():
    html = live.panel(job())
    assert "Waiting" in html
    assert "None" not in html
    assert "lt-bar" not in html
    assert "lt-numbers" not in html
    assert "<svg" not in html
    assert "press Train" in live.panel(None)


def test_an_error_keeps_every_line_and_says_what_to_do():
    html = live.panel(job(state="failed", error="lora_rank: expected 1, found 0\n\nCUDA out of memory"))
    assert "<b>Rank</b> <code>lora_rank</code>: expected 1, found 0" in html
    assert html.count("<li>") == 2
    assert advice("CUDA out of memory") in html
    assert "batch size" in advice("CUDA out of memory")
    assert "learning rate" in advice("step 3: not finite")


def test_the_log_shows_the_last_lines_newest_first():
    html = live.log(job(log=tuple(f"line {number}" for number in range(500))))
    assert html.count("<div>") == live.LOG_LINES
    assert html.index("line 499") < html.index("line 498")
    assert "line 299" not in html


def test_durations_and_sizes_in_words():
    assert [duration(seconds) for seconds in (0, 59.4, 75, 754, 3600, 7380)] == [
        "0 s",
        "59 s",
        "1 min 15 s",
        "13 min",
        "1 h 00 min",
        "2 h 03 min",
    ]
    assert [step_time(0.186), step_time(2.5)] == ["186 ms", "2.50 s"]
    assert [memory(300 * 1024**2), memory(5 * 1024**3)] == ["300 MiB", "5.0 GiB"]
    assert memory(5 * 1024**3, 8 * 1024**3) == "5.0 of 8.0 GiB"


def test_the_curve_is_bounded_and_survives_what_is_not_finite():
    losses = [(step, 0.1) for step in range(5000)] + [(5000, float("nan")), (5001, float("inf")), (5002, 1e9)]
    html = curve(losses) + judged(losses, losses[:-2], (5, 0.1))
    assert "nan" not in html
    assert "inf" not in html
    assert max(len(points.split()) for points in re.findall(r'points="([^"]*)"', html)) <= MAX_POINTS + 1
    spots = [
        tuple(map(float, spot.split(",")))
        for points in re.findall(r'points="([^"]*)"', html)
        for spot in points.split()
    ]
    assert all(0 <= x <= 600 and 0 <= y <= 160 for x, y in spots)
    assert curve([(1, 0.1)]) == ""
    assert curve([(1, 0.1), (1, 0.1)]) != ""


def test_the_chart_says_when_it_was_best_and_warns_once_it_has_got_worse():
    falling = [Point(0, 0.2, 0.2, 0.1, 0.1), Point(50, 0.2, 0.15, 0.06, 0.1), Point(100, 0.2, 0.14, 0.05, 0.1)]
    html = judgement(falling)
    assert "Best <b>now</b>: error 30% lower than without the LoRA." in html
    assert "lt-warning" not in html
    assert judgement(falling[:1]) == judgement([]) == ""
    html = judgement([*falling, Point(150, 0.2, 0.16, 0.03, 0.1)])
    assert "Best <b>at step 100</b>: error 30% lower than without the LoRA; at step 150 20% lower." in html
    assert "Overfitting" in html
    assert "Stop near step 100" in html
    # Two lines that begin at the base's zero, and the dot at two thirds of the way, at the bottom of the held-out line.
    lines = dict(re.findall(r'<polyline class="([^"]*)" points="([^"]*)"', html))
    zero, held_out, watched = (lines[name].split() for name in ("lt-zero", "lt-held-out", "lt-watched"))
    assert zero[0] == held_out[0] == watched[0] == "0.0,6.0"
    left, top = map(float, re.findall(r'class="lt-best" style="left:([\d.]+)%;top:([\d.]+)%"', html)[0])
    x, y = map(float, held_out[2].split(","))
    assert (left, top) == (pytest.approx(x / 6, abs=0.1), pytest.approx(y / 1.6, abs=0.1))
    assert y == max(float(spot.split(",")[1]) for spot in held_out)


def test_a_chart_without_a_base_to_compare_with_is_none():
    assert judgement([Point(0, 0.0, 0.0), Point(5, 0.0, 0.1)]) == ""
    assert "lt-watched" not in judgement([Point(0, 0.2, 0.2), Point(5, 0.2, 0.1)])


def test_the_smooth_line_starts_at_the_first_loss_and_follows():
    line = smooth([(0, 1.0)] * 5 + [(1, 0.0)] * 200)
    assert line[0][1] == line[4][1] == pytest.approx(1.0)
    assert line[-1][1] < 0.01


# The screen


def test_which_job_is_shown():
    done, first, second = job(id="done", state="done"), job(id="first"), job(id="second")
    host = FakeHost(FakeJobs(second, first, done))
    assert shown_job(host).id == "first"
    first.state = "paused"
    assert shown_job(host).id == "first"
    assert shown_job(host, "done").id == "done"
    assert shown_job(host, "gone").id == "first"
    first.state = second.state = "failed"
    assert shown_job(host).id == "second"
    done.finished = 9.0
    assert shown_job(host).id == "done"
    assert shown_job(FakeHost()) is None


def test_a_result_offers_the_prompt_and_the_grid_that_the_host_has():
    host = FakeHost(FakeJobs(job(state="done", output=("C:\\lora\\style.safetensors", "/run/a.png"))))
    result = look(host).result
    assert "<b>style.safetensors</b>" in result.file
    assert "C:\\lora<" in result.file
    assert (result.prompt, result.grid) == ("mystyle <lora:style:0.8>", "")
    host.infotext = "mystyle <lora:style:0.8>\nScript: X/Y/Z plot"
    shown = page(host, Handlers(host, changes).look("", ""))
    assert shown["grid"] == {"value": host.infotext}
    assert shown["compare"] == {"visible": True}


@pytest.mark.parametrize("state", ["training", "saving", "failed"])
def test_no_result_before_the_end_or_without_a_file(state: str):
    output = () if state == "failed" else ("/lora/style.safetensors",)
    assert look(FakeHost(FakeJobs(job(state=state, output=output)))).result is None


def test_the_checkpoint_line_warns():
    assert "No checkpoint" in live.checkpoint(None)
    html = live.checkpoint(Checkpoint("base", ("is merged", "is inpainting")))
    assert "Trains on <b>base</b>" in html
    assert html.count("lt-warning") == 2


# The events


def test_train_submits_what_the_controls_say():
    host = FakeHost()
    values = defaults() | {"train_data_dir": "pictures", "epochs": 3.0, "output_name": "cat"}
    message, picked, *screen = Handlers(host, changes).submit(tuple(values), trial=True)("", "j0", *values.values())
    assert "lt-error" not in message
    assert picked == ""
    assert host.submitted[0] == fields.settings(values) | {"trial": True}
    assert host.submitted[0]["epochs"] == 3
    shown = page(host, screen)
    assert "Waiting" in shown["panel"]
    assert shown["stop"] == {"interactive": True}
    assert 'data-active="1"' in shown["beat"]


def test_a_refused_config_shows_every_problem():
    host = FakeHost()
    values = defaults() | {"lora_rank": 2.5, "batch_size": None, "resolution": "12", "train_data_dir": ""}
    message, *_ = Handlers(host, changes).submit(tuple(values), trial=False)("", "", *values.values())
    assert host.submitted == []
    assert message.count("<li>") == 3
    for words in ("Rank", "Batch size", "Resolution", "2.5", "nothing", "&#x27;12&#x27;"):
        assert words in message


def test_stop_stops_the_job_on_show_if_it_is_active():
    host = FakeHost(FakeJobs(job(id="b"), job(id="a", state="training"), job(id="z", state="done")))
    handlers = Handlers(host, changes)
    handlers.stop("", "")
    picked, *screen = handlers.stop("b", "")
    assert picked == ""
    assert "lt-training" in page(host, screen)["panel"]
    handlers.stop("z", "")
    assert host.jobs.stopped == ["a", "b"]
    Handlers(FakeHost(), changes).stop("", "")


def test_a_job_told_to_stop_says_so_until_it_ended():
    running = job(**HALFWAY)
    host = FakeHost(FakeJobs(running, job(id="j0", state="preparing")))
    handlers = Handlers(host, changes)
    assert page(host, handlers.look("", ""))["stop"] == {"interactive": True}
    _, *screen = handlers.stop("", "")
    shown = page(host, screen)
    assert "Stopping" in shown["panel"]
    assert "saves what it has learned" in shown["panel"]
    assert " left</span>" not in shown["panel"]
    assert "Stopping" in shown["jobs"]
    assert 'data-lora-trainer-stop="j1"' not in shown["jobs"]
    assert shown["stop"] == {"interactive": False}
    # another page of the same WebUI
    assert "Stopping" in page(host, handlers.look("", ""))["panel"]
    running.state = "stopped"
    assert "Stopping" not in page(host, handlers.look("j1", ""))["panel"]
    handlers.stop("j0", "")
    assert "before the first step" in page(host, handlers.look("j0", ""))["panel"]


def test_one_button_pauses_and_goes_on():
    running = job(**HALFWAY)
    host = FakeHost(FakeJobs(running, job(id="f", state="failed"), job(id="d", state="done")))
    handlers = Handlers(host, changes)
    assert page(host, handlers.look("", ""))["pause"] == {"value": "Pause", "interactive": True}
    assert page(host, handlers.pause("", ""))["pause"] == {"value": "Continue", "interactive": True}
    assert page(host, handlers.pause("", ""))["pause"] == {"value": "Pause", "interactive": True}
    assert page(host, handlers.look("f", ""))["pause"] == {"value": "Continue", "interactive": True}
    assert page(host, handlers.look("d", ""))["pause"] == {"value": "Pause", "interactive": False}
    handlers.pause("f", "")
    handlers.pause("d", "")
    assert (host.jobs.paused, host.jobs.continued) == (["j1"], ["j1", "f"])
    Handlers(FakeHost(), changes).pause("", "")


def test_a_paused_job_offers_the_lora_as_it_is_now():
    paused = job(**HALFWAY | {"state": "paused", "output": ("a-1.safetensors", "a-2.safetensors")})
    host = FakeHost(FakeJobs(paused))
    shown = page(host, Handlers(host, changes).look("", ""))
    assert shown["result"] == {"visible": True}
    assert "a-2.safetensors" in shown["file"]["value"]


def test_a_failure_has_details_to_paste():
    host = FakeHost(FakeJobs(job(state="failed", error="the disk is full", details=f"LoRA Trainer 1 {EVIL}")))
    panel = page(host, Handlers(host, changes).look("", ""))["panel"]
    assert "Details for an issue" in panel
    assert "LoRA Trainer 1" in panel
    assert EVIL not in panel


def test_every_answer_carries_its_own_time(tmp_path: Path):
    host = FakeHost(folder=tmp_path / "new")
    handlers = Handlers(host, changes)
    values = defaults() | {"train_data_dir": "pictures"}
    refused = handlers.submit(("train_data_dir",), trial=False)("", "", "")[0]
    taken = handlers.submit(tuple(values), trial=False)("", "", *values.values())[0]
    note = tmp_path / "notes.docx"
    note.write_bytes(b"x")
    for answer in (refused, taken, handlers.receive([str(note)])[1]):
        assert re.search(r'<span data-at="\d+\.\d{3}"></span>$', answer)
        Wellformed(answer)


def test_a_result_is_sent_once_so_that_an_edited_prompt_stays():
    host = FakeHost(FakeJobs(job(state="done", output=("/lora/style.safetensors",))))
    handlers = Handlers(host, changes)
    first = page(host, handlers.look("", ""))
    assert first["result"] == {"visible": True}
    assert first["prompt"] == {"value": "mystyle <lora:style:0.8>"}
    assert first["grid"] == {"value": ""}
    assert first["compare"] == {"visible": False}
    assert 'data-active="0"' in first["beat"]
    second = page(host, handlers.look("", first["seen"]))
    assert second["prompt"] == second["result"] == {}
    host.jobs.list.insert(0, job(id="j2", state="training"))
    assert page(host, handlers.look("", second["seen"]))["result"] == {"visible": False}


def test_an_upload_fills_in_the_folder(tmp_path: Path):
    picture = tmp_path / "sent.tmp"
    picture.write_bytes(b"png")
    host = FakeHost(folder=tmp_path / "new")
    gradio3 = SimpleNamespace(name=str(picture), orig_name="cat.png")
    path, said = Handlers(host, changes).receive([gradio3])
    assert path == str(tmp_path / "new")
    assert "1 picture received" in said
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["cat.png"]


def test_a_refused_upload_keeps_the_folder_that_is_there(tmp_path: Path):
    note = tmp_path / "notes.docx"
    note.write_bytes(b"x")
    path, said = Handlers(FakeHost(folder=tmp_path / "new"), changes).receive([str(note)])
    assert path == {}
    assert "Not uploaded." in said
    assert not (tmp_path / "new").exists()


# The doctor


def report(*findings: Finding, looked_at: int = 2) -> Report:
    folder = Path(f"/{EVIL}")
    return Report(folder, 512, (folder / f"{EVIL}.png", folder / "b.png"), looked_at, 1, findings)


def test_findings_are_escaped_and_well_formed():
    file = report().pictures[0]
    told = [Finding("unreadable", "error", (file,), EVIL, EVIL), Finding("count", "advice", (), "few", "add some")]
    html = doctor.findings(report(*told))
    assert "img" not in Wellformed(html).seen
    assert html.count("&lt;img") >= 4
    assert html.count("<details") == 2
    assert html.count(" open>") == 1
    assert "1 error" in html
    assert "nothing to mend" in doctor.findings(report())
    assert "lora-trainer check" not in html
    assert "lora-trainer check" in doctor.findings(report(looked_at=1))


def test_many_findings_are_shortened():
    told = [Finding("small", "warning", (Path(f"{n}.png"),), "small", "larger") for n in range(500)]
    html = doctor.findings(report(*told))
    assert html.count("<li>") == doctor.SHOWN + 1
    assert "… and 480 more" in html
    assert html.count("larger") == 1


def test_a_click_looks_at_what_the_controls_name():
    host = FakeHost(report=report())
    click = Handlers(host, changes).check(("train_data_dir", "metadata_path", "resolution"))
    assert "nothing to mend" in click(' "C:\\my pictures" ', "", "768")
    assert host.checked == [{"train_data_dir": "C:\\my pictures", "resolution": "768"}]
    refused = click("", "", "")
    assert "Not looked at." in refused
    assert "img" not in Wellformed(refused).seen


# gradio itself


def test_the_blocks_have_a_control_for_every_shown_option_and_ask_the_host_nothing():
    pytest.importorskip("gradio")
    from lora_trainer.ui.tab import build

    host = FakeHost()
    blocks = build(host)
    made = {block.elem_id: block for block in blocks.blocks.values() if getattr(block, "elem_id", None)}
    for option in fields.shown():
        control = made[f"lora_trainer_{option.key}"]
        assert control.label == fields.label(option.key)
        assert control.value == fields.initial(option)
    assert not any(f"lora_trainer_{key}" in made for key in fields.HIDDEN)
    assert all(block.do_not_save_to_config for block in blocks.blocks.values())
    assert host.asked == 0
    assert host.bound == [
        (made["lora_trainer_try_it"], made["lora_trainer_prompt"]),
        (made["lora_trainer_compare"], made["lora_trainer_grid"]),
    ]


def test_the_page_and_its_script_agree_on_ids():
    root = Path(__file__).parents[2]
    script = (root / "javascript" / "lora_trainer.js").read_text(encoding="utf-8")
    tab = (root / "lora_trainer" / "ui" / "tab.py").read_text(encoding="utf-8")
    wanted = set(re.findall(r"lora_trainer_\w+", script))
    hidden = {"tick", "beat", "picked", "stop_picked"}
    clicked = {"train", "try_out", "find_rate", "message", "drop", "upload", "received"}
    assert wanted == {f"lora_trainer_{name}" for name in hidden | clicked}
    assert all(f'"{id}"' in tab for id in wanted)
    made = live.job_list([job(state="training")], None)
    marks = set(re.findall(r"data-lora-trainer-\w+", made))
    assert (
        marks
        == set(re.findall(r"data-lora-trainer-\w+", script))
        == {"data-lora-trainer-stop", "data-lora-trainer-show"}
    )


def test_the_editor_finds_its_button_its_folder_and_its_pass():
    pytest.importorskip("gradio")
    from lora_trainer.ui.tab import build

    made = {block.elem_id: block for block in build(FakeHost()).blocks.values() if getattr(block, "elem_id", None)}
    root = Path(__file__).parents[2]
    script = "".join(path.read_text(encoding="utf-8") for path in (root / "javascript").glob("lora_trainer_editor*.js"))
    wanted = set(re.findall(r"lora_trainer_\w+", script)) - {"lora_trainer_editor"}
    assert wanted == {f"lora_trainer_{name}" for name in ("edit", "pass", "train_data_dir", "metadata_path")}
    assert wanted <= set(made)
    assert made["lora_trainer_pass"].value == '<span data-pass="open &lt;sesame&gt;"></span>'
    assert "innerHTML" not in script
    style = (root / "style.css").read_text(encoding="utf-8")
    # What has a look of its own is named alike in both.
    assert set(re.findall(r"\.(lt-[\w-]+)", style.split("/* The caption editor")[1])) <= set(
        re.findall(r"lt-[\w-]+", script)
    )


def test_a_thousand_files_left_out_are_not_all_listed():
    html = live.note("1 picture received.", ["<b>"] * 1500)
    assert html.count("<li>") == live.LOG_LINES + 1
    assert "and 1,300 more" in html
    assert "1500 left out" in html
