"""Captioning a folder: rules, where captions go, what is never lost. The captioner here reads a drawing's color."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_trainer.captioning import run as running
from lora_trainer.captioning.journal import NAME
from lora_trainer.captioning.options import CaptionOptions, build, caption_options
from lora_trainer.captioning.rules import compose, spaced
from lora_trainer.captioning.run import run
from lora_trainer.captioning.words import CHARACTER, Tag, Words
from lora_trainer.cli import main
from lora_trainer.dataset.items import scan
from lora_trainer.errors import ConfigError, DataError, ModelError
from lora_trainer.events import Notice, Progress

COLORS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


class Eye:
    """Tells the color of a picture; `at(number)` is called before each."""

    name = "eye"

    def __init__(self, at=lambda number: None) -> None:
        self.at, self.seen, self.rested = at, 0, 0

    def caption(self, image: Image.Image) -> Words:
        self.seen += 1
        self.at(self.seen)
        pixel = image.getpixel((0, 0))
        color = next((name for name, value in COLORS.items() if value == pixel), None)
        return Words(tags=(Tag(f"{color}_ground", 0.9), Tag("odd", 0.1))) if color else Words()

    def rest(self) -> None:
        self.rested += 1


@pytest.fixture
def folder(tmp_path) -> Path:
    """a.png red, b.bmp green, sub/c.png blue, none with a caption."""
    place = tmp_path / "pictures"
    (place / "sub").mkdir(parents=True)
    for name, color in (("a.png", "red"), ("b.bmp", "green"), ("sub/c.png", "blue")):
        Image.new("RGB", (80, 80), COLORS[color]).save(place / name)
    return place


def captions(folder: Path, **given) -> dict[str, str]:
    """As a training reads them."""
    return {item.path.relative_to(folder).as_posix(): item.caption for item in scan(folder, **given).items}


WORDS = Words(sentence="a girl, smiling", tags=(Tag("long_hair", 0.5), Tag(">_<", 0.9), Tag("solo", 0.3)))


@pytest.mark.parametrize(
    ("given", "before", "after"),
    [
        ({}, "", "a girl, smiling, >_<, long hair"),
        ({"spaces": False}, "", "a girl, smiling, >_<, long_hair"),
        ({"threshold": 0.2}, "", "a girl, smiling, >_<, long hair, solo"),
        ({"threshold": 0.95}, "", "a girl, smiling"),
        ({"blacklist": "Long hair, >_<"}, "", "a girl, smiling"),
        ({"existing": "append"}, "my own, Long_Hair", "my own, Long_Hair, a girl, smiling, >_<"),
        ({"existing": "append"}, "smiling, a girl", "smiling, a girl, >_<, long hair"),
        ({"existing": "prepend"}, "my own, >_<", "a girl, smiling, long hair, my own, >_<"),
        ({"existing": "replace"}, "my own", "a girl, smiling, >_<, long hair"),
        ({"trigger_words": "sks"}, "", "sks, a girl, smiling, >_<, long hair"),
        ({"trigger_words": "sks", "existing": "append"}, "by sks,", "by sks, a girl, smiling, >_<, long hair"),
    ],
)
def test_the_rules(given, before, after):
    assert compose(WORDS, before, CaptionOptions(**given)) == after


def test_characters_have_a_threshold_of_their_own():
    words = Words(tags=(Tag("bob_(toy)", 0.8, CHARACTER), Tag("ball", 0.7)))
    assert compose(words, "", CaptionOptions(character_threshold=0.85)) == "ball"
    assert compose(words, "", CaptionOptions(character_threshold=0.75, escape=True)) == "bob \\(toy\\), ball"
    # Escaped or not, it is the same tag.
    assert compose(words, "bob (toy)", CaptionOptions(existing="append", escape=True)) == "bob (toy), ball"


@pytest.mark.parametrize("face", [">_<", "0_0", "(o)_(o)", "<|>_<|>", "||_||", "^_^", "+_-", "._.", "x_x", "6_9"])
def test_faces_keep_their_underscore(face):
    assert spaced(face) == face
    assert spaced("bob_(toy)") == "bob (toy)"


def test_options_tell_every_problem_at_once():
    with pytest.raises(ConfigError) as refused:
        build({"threshold": "2", "existing": "burn", "blacklist": "fine"})
    assert [line.split(":")[0] for line in refused.value.problems] == ["threshold", "existing"]
    assert build({"threshold": "0.5"}).threshold == 0.5
    assert all(option.help.endswith(".") for option in caption_options().values())


def test_text_files_beside_the_pictures(folder):
    (folder / "b.txt").write_text("mine", encoding="utf-8")
    events: list = []
    result = run(folder, Eye(), CaptionOptions(), sink=events.append)
    assert (result.state, result.written, result.kept) == ("done", 2, 1)
    assert captions(folder) == {"a.png": "red ground", "b.bmp": "mine", "sub/c.png": "blue ground"}
    assert (folder / "sub" / "c.txt").read_text(encoding="utf-8") == "blue ground\n"
    progress = [event for event in events if isinstance(event, Progress)]
    assert [(event.done, event.total) for event in progress] == [(1, 2), (2, 2)]
    assert progress[0].eta > 0
    assert progress[-1].eta == 0


def test_a_folders_words_are_no_captions_yet(folder):
    (folder / "sub").rename(folder / "3_sks girl")
    (folder / "b.txt").write_text("mine", encoding="utf-8")
    result = run(folder, Eye(), CaptionOptions())
    assert (result.written, result.kept) == (2, 1)
    assert captions(folder) == {"a.png": "red ground", "b.bmp": "mine", "3_sks girl/c.png": "blue ground"}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table_in_the_folder(folder, name):
    assert run(folder, Eye(), CaptionOptions(), output=folder / name).written == 3
    assert not list(folder.rglob("*.txt"))
    assert captions(folder) == {"a.png": "red ground", "b.bmp": "green ground", "sub/c.png": "blue ground"}
    # It is there now, and so the place where captions go.
    run(folder, Eye(), CaptionOptions(existing="append", trigger_words="x y", spaces=False, threshold=0))
    assert captions(folder)["a.png"] == "x y, red ground, odd"


def test_a_table_elsewhere_is_named_for_the_training(folder, tmp_path):
    (folder / "metadata.csv").write_text("a.png,mine\nb.bmp,mine\nsub/c.png,mine\n", encoding="utf-8")
    (folder / "b.txt").write_text("beside", encoding="utf-8")
    output, events = tmp_path / "other.csv", []
    result = run(folder, Eye(), CaptionOptions(), output=output, sink=events.append)
    # With that table, a training takes what is beside a picture, and nothing of the folder's own table.
    assert (result.written, result.kept) == (2, 1)
    assert captions(folder, metadata=output) == {"a.png": "red ground", "b.bmp": "beside", "sub/c.png": "blue ground"}
    assert set(captions(folder).values()) == {"mine"}
    assert any(f"metadata_path={output}" in event.text for event in events if isinstance(event, Notice))


def test_what_a_table_holds_stays(folder):
    rows = [
        {"file_name": "a.png", "text": 'mine, and quoted "so"', "artist": "me"},
        {"image": "./b.bmp", "caption": "", "seed": 7},
    ]
    table = folder / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run(folder, Eye(), CaptionOptions())
    found = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    assert found == [
        rows[0],
        {"image": "./b.bmp", "caption": "green ground", "seed": 7},
        {"file_name": "sub/c.png", "text": "blue ground"},
    ]
    csv = folder / "mine.csv"
    csv.write_text("file_name;text;rating\na.png;mine;5\n", encoding="utf-8")
    with pytest.raises(DataError, match="found rating; use another output"):
        run(folder, Eye(), CaptionOptions(), output=csv)
    csv.write_text('a.png;"mine; and ""so"""\n', encoding="utf-8")
    run(folder, Eye(), CaptionOptions(), output=csv)
    assert captions(folder, metadata=csv)["a.png"] == 'mine; and "so"'


def test_a_caption_file_with_mistakes_is_not_written_over(folder):
    table = folder / "metadata.csv"
    table.write_text('file_name,text\na.png,"never closed\n', encoding="utf-8")
    before = table.read_bytes()
    for existing in ("skip", "replace"):
        with pytest.raises(DataError, match="not valid CSV"):
            run(folder, Eye(), CaptionOptions(existing=existing))
    assert table.read_bytes() == before
    # The same for one elsewhere, and for a text file that cannot be read.
    table.rename(folder.parent / "other.csv")
    with pytest.raises(DataError, match="not valid CSV"):
        run(folder, Eye(), CaptionOptions(), output=folder.parent / "other.csv")
    (folder / "a.txt").write_bytes(bytes(range(128, 256)))
    for output in (None, folder.parent / "new.csv"):
        with pytest.raises(DataError, match="a.txt: expected UTF-8"):
            run(folder, Eye(), CaptionOptions(), output=output)
    assert not (folder.parent / "new.csv").exists()


def test_outputs_that_cannot_be(folder):
    for output, problem in ((folder / "x.txt", "ends in .csv or .jsonl"), (folder, "ends in"), (Path("."), "ends in")):
        with pytest.raises(ConfigError, match=problem):
            run(folder, Eye(), CaptionOptions(), output=output)
    (folder / "d.csv").mkdir()
    with pytest.raises(ConfigError, match="expected a file"):
        run(folder, Eye(), CaptionOptions(), output=folder / "d.csv")
    with pytest.raises(DataError, match="no such folder"):
        run(folder / "none", Eye(), CaptionOptions())
    (folder / "sub" / "metadata.csv").write_text("c.png,mine\n", encoding="utf-8")
    assert run(folder, Eye(), CaptionOptions()).written == 2
    with pytest.raises(DataError, match="wins over text files"):
        run(folder, Eye(), CaptionOptions(existing="replace"))


def test_two_pictures_of_one_name(folder):
    Image.new("RGB", (80, 80), COLORS["blue"]).save(folder / "a.gif")
    run(folder, Eye(), CaptionOptions())
    assert captions(folder)["a.png"] == "red ground"
    assert (folder / "a.gif.txt").is_file()
    for place in folder.glob("a.*.txt"):
        place.unlink()
    (folder / "a.txt").write_text("of both", encoding="utf-8")
    result = run(folder, Eye(), CaptionOptions(existing="replace"))
    assert sorted(result.refused) == ["a.gif", "a.png"]
    assert (folder / "a.txt").read_text(encoding="utf-8") == "of both"


def test_the_file_that_is_read_is_the_one_that_is_written(folder):
    (folder / "a.txt").write_text(" \n", encoding="utf-8")
    (folder / "a.caption").write_text("mine", encoding="utf-8")
    run(folder, Eye(), CaptionOptions(existing="append"))
    assert captions(folder)["a.png"] == "mine, red ground"
    assert (folder / "a.caption").read_text(encoding="utf-8") == "mine, red ground\n"


def test_unreadable_pictures_and_those_without_words_are_named(folder):
    (folder / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (80, 80), (9, 9, 9)).save(folder / "b.bmp")
    events: list = []
    result = run(folder, Eye(), CaptionOptions(), sink=events.append)
    assert (result.unreadable, result.wordless, result.written) == (["a.png"], ["b.bmp"], 1)
    told = [event.text for event in events if isinstance(event, Notice) and event.level == "warning"]
    assert any(text.startswith("a.png: is no picture") for text in told)
    assert not (folder / "b.txt").exists()
    assert "1 could not be read, 1 got no words" in result.summary()


def test_a_caption_that_could_not_be_read_again_is_not_written(folder):
    class Everything(Eye):
        def caption(self, image: Image.Image) -> Words:
            return Words(tags=tuple(Tag(f"tag_{n}", 0.4) for n in range(3000)))

    events: list = []
    result = run(folder, Everything(), CaptionOptions(), sink=events.append)
    assert (result.written, result.refused) == (0, ["a.png", "b.bmp", "sub/c.png"])
    # Nothing is said of the file names that a training would use now.
    assert "raise the threshold" in events[0].text
    assert not list(folder.rglob("*.txt"))


def test_an_interrupted_run_is_taken_up(folder):
    def crash(number: int) -> None:
        if number == 3:
            raise RuntimeError("cut off")

    for name in ("a", "b", "sub/c"):
        (folder / f"{name}.txt").write_text("mine", encoding="utf-8")
    options, eye = CaptionOptions(existing="append"), Eye(crash)
    with pytest.raises(RuntimeError):
        run(folder, eye, options)
    assert eye.rested == 1
    assert list(captions(folder).values()) == ["mine, red ground", "mine, green ground", "mine"]
    # Others do not take up its journal.
    assert (folder / NAME).is_file()
    second = Eye()
    result = run(folder, second, options)
    assert (second.seen, result.written, result.kept) == (1, 1, 2)
    assert set(captions(folder).values()) == {"mine, red ground", "mine, green ground", "mine, blue ground"}
    assert not (folder / NAME).exists()
    again = run(folder, Eye(), options)
    assert (again.written, again.kept) == (0, 3)


def test_a_stop_counts_at_each_picture_and_loses_nothing(folder, monkeypatch):
    output, eye = folder / "metadata.csv", Eye()
    result = run(folder, eye, CaptionOptions(), output=output, stopping=lambda: eye.seen == 2)
    assert (result.state, eye.seen) == ("stopped", 2)
    assert output.read_text(encoding="utf-8").count("ground") == 2
    assert run(folder, eye, CaptionOptions(), output=output).written == 1
    # A killed process has published every few pictures.
    monkeypatch.setattr(running, "PUBLISH_PICTURES", 1)
    output.unlink()
    seen: list[int] = []
    watching = Eye(lambda number: seen.append(output.read_text().count("ground") if output.exists() else 0))
    run(folder, watching, CaptionOptions(), output=output)
    assert seen == [0, 1, 2]


def test_a_name_on_the_hub_is_refused_unless_asked_for(folder, capsys, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloads"))
    assert main(["caption", "--input", str(folder), "--output", str(folder / "metadata.csv")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--download" in line
    assert main(["caption", "--input", str(folder), "--captioner", "no/such/thing"]) == 2
    assert "expected a folder, or a name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "found neither"),
        ({"config.json": "{"}, "expected model_type"),
        ({"config.json": '{"model_type": "llava", "architectures": ["X"]}'}, "found llava"),
        ({"config.json": '{"model_type": "blip", "architectures": ["X"]}', "pytorch_model.bin": ""}, "as .safetensors"),
    ],
)
def test_folders_that_hold_no_captioner(tmp_path, files, found):
    from lora_trainer.captioning.load import open_folder

    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=found):
        open_folder(tmp_path)
