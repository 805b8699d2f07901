"""Clicks with any values, and jobs of any words: the page stays one page."""

from __future__ import annotations

from html.parser import HTMLParser
from types import SimpleNamespace

from hypothesis import strategies as st

from lora_trainer.curve import Point
from lora_trainer.jobs.view import JobView
from lora_trainer.ui import fields, live
from lora_trainer.ui.handlers import Handlers
from lora_trainer.ui.ports import Checkpoint
from lora_trainer.ui.screen import look
from tests.fuzz.harness import fuzz, works_or_refuses
from tests.fuzz.host import host
from tests.fuzz.inputs import TEXT, VALUES, file
from tests.fuzz.watch import ARENA

KEYS = tuple(option.key for option in fields.shown())
TAGS = {
    "div",
    "span",
    "b",
    "ul",
    "li",
    "br",
    "code",
    "details",
    "summary",
    "dl",
    "dt",
    "dd",
    "button",
    "svg",
    "polyline",
    *("table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"class", "role", "title", "type", "style", "tabindex", "points", "viewbox", "preserveaspectratio"}
ATTRIBUTES |= {"data-active", "data-beat", "data-at", "data-lora-trainer-stop", "data-lora-trainer-show"}


MARKUP = st.sampled_from(["<script>alert(1)</script>", "'\"><img src=x onerror=x>", "</div><!--", "<b>x"])
WORDS = MARKUP | TEXT


class Page(HTMLParser):
    """Fails on what a page of ours never holds, and on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        assert all(name in ATTRIBUTES or name.startswith("aria-") for name, _ in attrs)
        if tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


def harmless(html: str) -> None:
    Page(html)
    assert "<script" not in html.lower()
    assert len(html) < 2_000_000


def screen(answer: list[object]) -> None:
    for value in answer:
        if isinstance(value, str) and value.startswith("<"):
            harmless(value)
        elif isinstance(value, dict) and str(value.get("value", "")).startswith("<div"):
            harmless(value["value"])


def handlers() -> Handlers:
    return Handlers(host(), lambda **changes: changes)


CHANGES = st.dictionaries(st.sampled_from(KEYS), WORDS | VALUES, max_size=4)


@fuzz("tab", 120, changes=CHANGES, seen=WORDS, picked=WORDS, trial=st.booleans())
def test_any_click_on_train(changes, seen, picked, trial):
    values = {option.key: fields.initial(option) for option in fields.shown()}
    values |= {"train_data_dir": str(ARENA.inside), **changes}
    with works_or_refuses():
        answer = handlers().submit(KEYS, trial=trial)(seen, picked, *values.values())
        harmless(answer[0])
        screen(answer[1:])


@fuzz("tab", 60, picked=TEXT, seen=TEXT)
def test_any_job_picked(picked, seen):
    screen(handlers().look(picked, seen))
    screen(handlers().stop(picked, seen))


SENT = st.lists(st.tuples(TEXT, st.sampled_from([".png", ".txt", ".zip", ""]), st.binary(max_size=30)), max_size=4)


@fuzz("tab", 60, sent=SENT)
def test_any_upload(sent):
    files = [
        SimpleNamespace(name=str(file(f"gradio-{at}", content)), orig_name=name + suffix)
        for at, (name, suffix, content) in enumerate(sent)
    ]
    folder, message = handlers().receive([*files, str(file("gradio.png", b"x"))])
    harmless(message)
    assert isinstance(folder, dict) or folder == str(ARENA.inside / "upload")


NUMBER = st.none() | st.integers(0, 10**6) | st.floats(0, 1e9)
STATE = st.sampled_from([*live.STATES])
LOSSES = st.lists(st.tuples(st.integers(0, 10**6), st.floats()), max_size=30).map(tuple)
SCORE = st.none() | st.floats(-1, 1)
RATE = st.floats(1e-6, 1)
JOBS = st.builds(
    JobView,
    id=WORDS,
    name=WORDS,
    state=STATE,
    created=st.floats(0, 1e10),
    settings=st.fixed_dictionaries({}, optional={"max_train_steps": NUMBER, "trigger_words": WORDS}),
    stage=WORDS,
    step=st.integers(0, 10**6),
    steps=st.none() | st.integers(0, 10**6),
    losses=LOSSES,
    validations=st.lists(st.builds(Point, st.integers(0, 9), *[st.floats(0, 2)] * 4), max_size=4).map(tuple),
    comparisons=st.lists(
        st.tuples(st.integers(0, 9), st.floats(-9, 2), st.floats(0, 2), st.floats(0, 1), *[SCORE] * 2), max_size=9
    ).map(tuple),
    learning_rate=st.none() | st.floats(0, 1),
    kind=st.sampled_from(["train", "find-lr"]),
    sweep=st.lists(st.tuples(RATE, st.floats(0, 1e9) | st.just(float("nan"))), max_size=9).map(tuple),
    suggested=st.none() | RATE,
    why=st.none() | WORDS,
    log=st.lists(WORDS, max_size=5).map(tuple),
    output=st.lists(WORDS.map("{}.safetensors".format) | WORDS, max_size=3).map(tuple),
    error=st.none() | WORDS,
)


@fuzz("tab", 120, jobs=st.lists(JOBS, min_size=1, max_size=3), title=WORDS, warning=WORDS, stopping=st.booleans())
def test_jobs_of_any_words(jobs, title, warning, stopping):
    known = SimpleNamespace(jobs=lambda: jobs, job=lambda id: jobs[0])
    place = SimpleNamespace(
        jobs=known,
        checkpoint=lambda: Checkpoint(title, (warning,)),
        prompt=lambda job: job.name,
        grid=lambda job: None,
    )
    shown = look(place, "x", {job.id for job in jobs} if stopping else ())
    for html in (shown.checkpoint, shown.panel, shown.log, shown.jobs, shown.result.file if shown.result else ""):
        harmless(html)


@fuzz("tab", 40, text=WORDS, lines=st.lists(WORDS, max_size=5))
def test_notes_and_refusals_of_any_words(text, lines):
    harmless(live.refusal("\n".join([text, *lines]), head=text))
    harmless(live.note(text, lines))
