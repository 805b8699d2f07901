"""A search for a learning rate in the tab: its curve, its words, and the buttons that begin it and take its result."""

from __future__ import annotations

import math
import re

import pytest

from lora_trainer.config.options import options
from lora_trainer.ui import fields, live
from lora_trainer.ui.chart import HEIGHT, WIDTH, swept
from lora_trainer.ui.handlers import Handlers
from lora_trainer.ui.screen import look
from tests.unit.test_ui import EVIL, FakeHost, FakeJobs, Wellformed, changes, defaults, job, page

# From 1e-5 to 1e-1, least at 1e-3, blown up at the end.
CURVE = ((1e-5, 0.2), (1e-4, 0.19), (1e-3, 0.1), (1e-2, 0.15), (1e-1, 9.0))
FOUND = {"kind": "find-lr", "state": "done", "sweep": CURVE, "suggested": 4e-4, "why": "it fell <there>"}


def lines(html: str) -> dict[str, list[tuple[float, float]]]:
    found = re.findall(r'<polyline class="([^"]*)" points="([^"]*)"', html)
    return {name: [tuple(map(float, spot.split(","))) for spot in points.split()] for name, points in found}


def test_the_curve_goes_by_the_logarithm_and_points_out_the_suggestion():
    html = swept(CURVE, 1e-2)
    drawn = lines(html)
    assert [x for x, _ in drawn["lt-held-out"]] == pytest.approx([0, WIDTH / 4, WIDTH / 2, WIDTH * 3 / 4, WIDTH])
    heights = [y for _, y in drawn["lt-held-out"]]
    assert heights.index(max(heights)) == 2
    assert {x for x, _ in drawn["lt-mark"]} == {WIDTH * 3 / 4}
    assert {y for _, y in drawn["lt-zero"]} == {heights[0]}
    # What is above the base by more than a tenth lies on the edge, or all else would be flat.
    assert 0 <= heights[4] < heights[0] < HEIGHT / 4
    assert re.findall(r'style="left:([\d.]+)%">(1e-\d)', html) == [(f"{25.0 * n}", f"1e-{5 - n}") for n in range(5)]
    assert "lt-mark" not in swept(CURVE)


def test_a_curve_takes_whatever_was_measured():
    assert swept(CURVE[:1]) == ""
    assert swept((*CURVE[:1], (1e-4, math.nan))) == ""
    assert "nan" not in swept((*CURVE, (1.0, math.nan), (2.0, math.inf)))
    Wellformed(swept(((1e-5, 0.2), (2e-5, 0.2))))


def test_the_panel_says_what_was_found_and_why():
    host = FakeHost(FakeJobs(job(**FOUND)))
    panel = look(host).panel
    Wellformed(panel)
    assert "learning rate for style" in panel
    assert "Learning rate <b>0.0004</b>: it fell &lt;there&gt;." in panel
    assert "lt-mark" in panel
    nothing = look(FakeHost(FakeJobs(job(**FOUND | {"suggested": None, "why": EVIL})))).panel
    assert "No learning rate found" in nothing
    assert "lt-mark" not in nothing
    assert "img" not in Wellformed(nothing).seen
    assert "lt-ticks" not in look(FakeHost(FakeJobs(job(state="done")))).panel


def test_while_it_runs_it_is_named_and_can_be_stopped_and_paused():
    running = job(kind="find-lr", state="training", sweep=CURVE[:3], step=8, steps=120, eta=30.0)
    host = FakeHost(FakeJobs(running))
    screen = look(host)
    assert "Searching" in screen.panel
    assert "Step 8 of 120" in screen.panel
    assert "30 s left" in screen.panel
    assert "learning rate for style" in screen.jobs
    assert (screen.stoppable, screen.pausable, screen.offer, screen.result) == (True, True, "", None)
    assert "judges what it has seen" in live.panel(running, stopping={"j1"})


def test_the_button_searches_with_what_the_controls_say():
    host = FakeHost()
    values = defaults() | {"train_data_dir": "pictures", "lora_rank": 12.0}
    message, picked, *screen = Handlers(host, changes).submit(tuple(values), find=True)("", "j0", *values.values())
    assert "lt-error" not in message
    assert picked == ""
    assert host.submitted == [fields.settings(values)]
    assert "learning rate for style" in page(host, screen)["panel"]


def test_a_refused_search_shows_every_problem():
    host = FakeHost()
    values = defaults() | {"lora_rank": 2.5, "batch_size": None}
    message, *_ = Handlers(host, changes).submit(tuple(values), find=True)("", "", *values.values())
    assert host.submitted == []
    assert message.count("<li>") == 2


def test_what_was_found_is_offered_and_taken():
    host = FakeHost(FakeJobs(job(**FOUND | {"id": "b"}), job(id="a", state="done")))
    handlers = Handlers(host, changes)
    shown = page(host, handlers.look("b", ""))["use_rate"]
    assert shown == {"value": "Use 0.0004 as the learning rate", "visible": True}
    assert page(host, handlers.look("a", ""))["use_rate"]["visible"] is False
    said, control = handlers.use_rate("b")
    assert control == {"value": 4e-4}
    assert f"Learning rate is now 0.0004, under {options()['learning_rate'].group}." in said
    # And what is submitted then is that rate.
    assert fields.settings(defaults() | {"learning_rate": control["value"]})["learning_rate"] == 4e-4
    assert handlers.use_rate("a")[1] == {}
    assert Handlers(FakeHost(), changes).use_rate("")[1] == {}


def test_the_button_is_right_under_the_learning_rate():
    pytest.importorskip("gradio")
    from lora_trainer.ui.tab import build

    blocks = build(FakeHost())
    order = [block.elem_id for block in blocks.blocks.values() if getattr(block, "elem_id", None)]
    assert order.index("lora_trainer_find_rate") == order.index("lora_trainer_learning_rate") + 1
