"""Several folders in one run: by the settings, by kohya's folder names, by imagefolder's splits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lora_trainer.config import Concept, build, words_of
from lora_trainer.config.export import to_header, to_yaml
from lora_trainer.config.sources import parse_overrides, read_file
from lora_trainer.dataset.grouping import by_folder
from lora_trainer.dataset.items import scan
from lora_trainer.doctor import examine
from lora_trainer.doctor.subject import Wanted
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.events import Finished, Notice, Started, StepDone
from lora_trainer.hosts.ports import Host
from lora_trainer.hosts.roots import Roots
from lora_trainer.hosts.standalone import AloneLease, FileModels, FolderStore
from lora_trainer.training.control import StopOnly
from lora_trainer.training.run import run
from lora_trainer.ui import fields

NEEDED = {"train_data_dir": "data", "base_model": "b.safetensors"}


def made(where: Path, *names: str, **texts: str) -> Path:
    """A folder of empty files."""
    for name in (*names, *texts):
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(texts.get(name, ""), encoding="utf-8")
    return where


def seen(found, where: Path) -> dict[str, tuple[str, int]]:
    return {item.path.relative_to(where).as_posix(): (item.caption, item.repeats) for item in found.items}


# The settings


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("concepts=castle", [Concept(folder="castle")]),
        ("concepts={folder: a b, repeats: 10}", [Concept(folder="a b", repeats=10)]),
        ('concepts=[{folder: "C:\\\\x", caption: y}, z]', [Concept(folder="C:\\x", caption="y"), Concept(folder="z")]),
        ("concepts=[]", []),
    ],
)
def test_the_command_line_writes_them_as_yaml_does(written, expected):
    assert build(NEEDED, parse_overrides([written])).concepts == expected


def test_they_survive_every_way_out(tmp_path):
    text = (
        "concepts:\n  - castle\n  - folder: knights\n    repeats: 3\n    trigger_words: my knight\n    caption: one\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = build(NEEDED, read_file(path))
    assert config.concepts[1] == Concept(folder="knights", repeats=3, trigger_words="my knight", caption="one")
    path.write_text(to_yaml(config))
    assert build(read_file(path)) == config
    assert build(NEEDED, json.loads(to_header(config))) == config


def test_a_header_does_not_tell_where_folders_are():
    config = build(NEEDED, {"concepts": ["/home/me/castle", "C:\\Users\\me\\art", "../up/knights", "in/side"]})
    told = [concept["folder"] for concept in json.loads(to_header(config))["concepts"]]
    assert told == ["castle", "art", "knights", "in/side"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([{"folder": "a"}, {"folder": "b", "repeats": 0}], "concepts, entry 2, repeats: expected a whole number"),
        ([{"repeats": 2}], "concepts, entry 1: expected a folder, found none"),
        (
            [{"folder": "a", "repeat": 2}],
            "concepts, entry 1: expected folder, repeats, trigger_words, caption, regularization, found",
        ),
        ("{folder: a", "concepts, entry 1: expected {folder: …}"),
        (
            3,
            "concepts: expected a list of folders or of {folder, repeats, trigger_words, caption, regularization}, "
            "found 3",
        ),
        (["a", "./a"], "concepts: expected each folder once, found './a' in entries 1 and 2"),
        ([" "], "concepts, entry 1: expected a folder, found nothing"),
        (["x"] * 500, "concepts: expected at most 100 entries, found 500"),
    ],
)
def test_what_is_wrong_with_which_entry(value, problem):
    with pytest.raises(ConfigError) as caught:
        build(NEEDED, {"concepts": value})
    assert caught.value.problems[0].startswith(problem)


def test_the_tab_takes_one_a_line():
    typed = {"train_data_dir": "data", "concepts": "castle\n\n{folder: knights, repeats: 3}\n"}
    config = build(NEEDED, fields.settings(typed))
    assert config.concepts == [Concept(folder="castle"), Concept(folder="knights", repeats=3)]
    placeholder = fields.placeholder(fields.options()["concepts"])
    assert build(NEEDED, fields.settings({"concepts": placeholder})).concepts[0].repeats == 10


def test_trigger_words_of_all():
    settings = {"trigger_words": "my style,", "concepts": [{"folder": "a", "trigger_words": "alice"}, {"folder": "b"}]}
    assert words_of(settings) == "my style, alice"
    assert words_of({"trigger_words": None}) == ""


def test_on_a_reachable_webui_no_concept_leads_out(tmp_path):
    home = made(tmp_path / "home", "set/castle/a.png")
    made(tmp_path / "secret", "a.png")
    (home / "set" / "link").symlink_to(tmp_path / "secret")
    given = {"train_data_dir": str(home / "set")}
    roots = Roots([home], enforced=True)
    assert roots.settings({**given, "concepts": ["castle"]})["concepts"] == [{"folder": "castle"}]
    for folder in (
        str(tmp_path / "secret"),
        "link",
        "../../secret",
        "castle/../../../secret",
        "\\\\nas\\x",
        "%2e%2e/x",
    ):
        for value in ([folder], [{"folder": folder}], f'{{folder: "{json.dumps(folder)[1:-1]}"}}', folder):
            with pytest.raises(ConfigError, match="concepts, entry 1: expected"):
                roots.settings({**given, "concepts": value})
    with pytest.raises(ConfigError, match="concepts"):
        roots.settings({**given, "concepts": [{"repeats": 2}]})
    # To its owner alone everything is open.
    assert Roots([home], enforced=False).settings({**given, "concepts": ["link"]})["concepts"] == [{"folder": "link"}]


# What a folder becomes


def test_only_the_named_folders_each_in_its_own_way(tmp_path):
    where = made(tmp_path / "data", "no.png", "castle/a.png", "castle/sub/b.png", "other/no.png", "old/c.png")
    made(tmp_path / "else", "d.png")
    (where / "metadata.csv").write_text("no.png,no\ncastle/a.png,a gate\nold/c.png,my old tower\n")
    (where / "castle" / "metadata.csv").write_text("sub/b.png,a wall\n")
    concepts = [
        Concept(folder="castle", repeats=10, trigger_words="my castle"),
        Concept(folder="old", trigger_words=""),
        Concept(folder=str(tmp_path / "else"), caption="a house", repeats=2),
    ]
    found = scan(where, concepts=concepts, trigger_words="sks")
    assert seen(found, tmp_path) == {
        "data/castle/a.png": ("my castle, a gate", 10),
        "data/castle/sub/b.png": ("my castle, a wall", 10),
        "data/old/c.png": ("my old tower", 1),
        "else/d.png": ("sks, a house", 2),
    }
    assert found.notes == (
        f'{where}: 1 of 4 pictures have no caption of their own: they get that of their concept, "a house"',
    )


def test_the_nearest_of_nested_concepts_counts(tmp_path):
    where = made(tmp_path, "a.png", "castle/b.png", "castle/gate/c.png", "x.txt")
    concepts = [Concept(folder=".", caption="x"), Concept(folder="castle", repeats=3, caption="y")]
    for order in (concepts, concepts[::-1]):
        assert seen(scan(where, concepts=order), where) == {
            "a.png": ("x", 1),
            "castle/b.png": ("y", 3),
            "castle/gate/c.png": ("y", 3),
        }


def test_a_concept_that_is_not_there_or_lacks_captions(tmp_path):
    where = made(tmp_path, "a/1.png", "b/2.png", **{"a/1.txt": "a cat"})
    with pytest.raises(DataError, match="nowhere: no such folder"):
        scan(where, concepts=[Concept(folder="a"), Concept(folder="nowhere")])
    with pytest.raises(DataError, match=r"1 of 2 pictures have no caption \(b/2\.png\)"):
        scan(where, concepts=[Concept(folder="a"), Concept(folder="b")])


def test_kohyas_folder_names(tmp_path):
    where = made(tmp_path, "10_sks_castle gate/a.png", "10_sks_castle gate/b.png", "2_1/c.png", "notes/x.txt", "d.png")
    made(where, **{"10_sks_castle gate/a.txt": "a wall", "2_1/c.txt": "a door", "d.txt": "a roof"})
    found = scan(where)
    assert seen(found, where) == {
        "10_sks_castle gate/a.png": ("a wall", 10),
        "10_sks_castle gate/b.png": ("sks castle gate", 10),
        "2_1/c.png": ("a door", 2),
        "d.png": ("a roof", 1),
    }
    assert [item.source for item in found.items] == [".txt", "concept", ".txt", ".txt"]
    told = "an epoch repeats the pictures of folders as their names say: 10 × 10_sks_castle gate, 2 × 2_1"
    assert told in found.notes[0]
    assert "those in no sub-folder once" in found.notes[0]
    assert (
        '1 of 4 pictures have no caption of their own: they get that of their concept, "sks castle gate"'
        in found.notes[1]
    )


@pytest.mark.parametrize("other", ["dog", "2024_paris", "0_dog", "x10_dog", "10dog"])
def test_numbers_of_only_some_folders_mean_nothing(tmp_path, other):
    where = made(tmp_path, "10_cat/a.png", f"{other}/b.png")
    found = scan(where)
    assert {repeats for _, repeats in seen(found, where).values()} == {1}
    assert f"numbers such as that of 10_cat repeat no pictures, since {other} has none" in found.notes[0]
    shutil.rmtree(where / "10_cat")
    assert not any("repeat" in note for note in scan(where).notes)


def test_of_imagefolders_splits_only_train_is_trained_on(tmp_path):
    where = made(tmp_path, "train/images/1.png", "train/2.png", "test/3.png", "validation/4.png")
    rows = [{"file_name": "images/1.png", "text": "one"}, {"file_name": "2.png", "text": "two"}]
    (where / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = scan(where)
    assert seen(found, where) == {"train/images/1.png": ("one", 1), "train/2.png": ("two", 1)}
    assert "only train is trained on; test, validation can be the validation_data_dir" in found.notes[0]
    (where / "train" / "metadata.jsonl").unlink()
    table = "file_name,text\ntrain/images/1.png,one\ntrain/2.png,two\ntest/3.png,three\n"
    (where / "metadata.csv").write_text(table)
    assert seen(scan(where), where) == {"train/images/1.png": ("one", 1), "train/2.png": ("two", 1)}
    (where / "metadata.csv").unlink()
    made(where, "cats/5.png")
    # A folder of another name beside them: these are no splits.
    assert len(seen(scan(where), where)) == 4


def test_parquet_is_refused_by_its_name(tmp_path):
    where = made(tmp_path, "a.png", "metadata.parquet")
    with pytest.raises(DataError, match=r"metadata\.parquet: expected captions as metadata\.csv .* found Parquet"):
        scan(where)
    (where / "metadata.csv").write_text("a.png,x")
    assert seen(scan(where), where) == {"a.png": ("x", 1)}


def test_names_of_folders_that_share_them(tmp_path):
    where = made(tmp_path, "a/img/1.png", "b/img/2.png", "c/3.png")
    found = scan(where, concepts=[Concept(folder=f"{name}", caption="x") for name in ("a/img", "b/img", "c")])
    assert list(by_folder(found.items)) == ["a/img", "b/img", "c"]


def test_the_doctor_counts_what_an_epoch_sees(tmp_path):
    for name, count in (("castle", 12), ("dragon", 3)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.effect_noise((96, 96), 50 + index).save(tmp_path / name / f"{name}{index}.png")
            (tmp_path / name / f"{name}{index}.txt").write_text(f"{name} number {index}")

    def imbalance(*concepts):
        report = examine(tmp_path, concepts=concepts, wanted=Wanted(64))
        return [finding.reason for finding in report.findings if finding.kind == "imbalance"]

    assert imbalance() == ["pictures by folder: castle 12, dragon 3"]
    assert imbalance(Concept(folder="castle"), Concept(folder="dragon", repeats=4)) == []
    assert imbalance(Concept(folder="castle"), Concept(folder="dragon", repeats=20)) == [
        "visits an epoch by folder: dragon 60, castle 12"
    ]


# Runs


@pytest.fixture
def album(pictures) -> Path:
    """The six pictures in kohya's form: one 3 times, five once."""
    (pictures / "3_gate").mkdir()
    (pictures / "1_wall").mkdir()
    for file in pictures.glob("*.png"):
        file.rename(pictures / ("3_gate" if file.stem == "p0" else "1_wall") / file.name)
    rows = (pictures / "metadata.csv").read_text().splitlines()
    rows = [("3_gate/" if row.startswith("p0") else "1_wall/") + row for row in rows]
    (pictures / "metadata.csv").write_text("\n".join(rows))
    return pictures


def train(settings, *, stop=lambda events: False, resumes=False, **changes):
    """(events, bytes of the file or None, its metadata)."""
    config = build(settings, changes)
    events: list = []
    host = Host(
        FileModels(Path(config.base_model), torch.device("cpu"), torch.float32),
        AloneLease(),
        FolderStore(Path(config.output_dir), overwrite=True),
    )
    control = StopOnly(lambda: stop(events))
    finished = run(config, host, events.append, clock=lambda: 1.7e9, control=control, resumes=resumes)
    if not finished.output:
        return events, None, {}
    with safe_open(finished.output[0], framework="pt") as file:
        return events, Path(finished.output[0]).read_bytes(), file.metadata()


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_a_run_repeats_and_the_file_says_so(settings, album):
    events, _, metadata = train(settings)
    # 1 + 4 pictures, of which one 3 times, in two shapes: 4 squares with 3 visits of one are 6, and 2 wide ones.
    assert of(events, Started)[0].images == 6
    assert of(events, Started)[0].steps == 2 * (3 + 1)
    notices = [event.text for event in of(events, Notice)]
    assert "1_wall 5 × 1, 3_gate 1 × 3: an epoch sees 6 pictures 8 times in all" in notices
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "1_wall": {"n_repeats": 1, "img_count": 5},
        "3_gate": {"n_repeats": 3, "img_count": 1},
    }
    assert metadata["ss_num_train_images"] == "8"
    assert json.loads(metadata["ss_tag_frequency"])["3_gate"] == {"picture": 1, "number 0": 1}
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"].values()
    assert sorted(bucket["count"] for bucket in buckets) == [2, 6]
    # The same by the settings, whatever the folders are called.
    for old, new in (("3_gate", "gate"), ("1_wall", "wall")):
        (album / old).rename(album / new)
    rows = (album / "metadata.csv").read_text().replace("3_gate", "gate").replace("1_wall", "wall")
    (album / "metadata.csv").write_text(rows)
    concepts = [{"folder": "wall"}, {"folder": "gate", "repeats": 3}]
    again, _, metadata = train(settings, concepts=concepts)
    assert [step.loss for step in of(again, StepDone)] == [step.loss for step in of(events, StepDone)]
    assert json.loads(metadata["lora_trainer_config"])["concepts"] == concepts


def test_a_stopped_run_with_repeats_goes_on_exactly(settings, album, tmp_path):
    settings = settings | {"checkpoint_every": 2}
    _, whole, _ = train(settings, output_dir=str(tmp_path / "whole"))
    stopped, _, _ = train(settings, stop=lambda events: len(of(events, StepDone)) >= 5)
    assert of(stopped, Finished)[0].state == "stopped"
    _, data, _ = train(settings, resumes=True)
    assert data == whole
    stopped, _, _ = train(settings, stop=lambda events: len(of(events, StepDone)) >= 3, output_dir=str(tmp_path / "x"))
    (album / "3_gate").rename(album / "4_gate")
    rows = (album / "metadata.csv").read_text().replace("3_gate", "4_gate")
    (album / "metadata.csv").write_text(rows)
    with pytest.raises(Exception, match="pictures or captions have changed"):
        train(settings, resumes=True, output_dir=str(tmp_path / "x"))


def test_the_trial_counts_repeats(settings, album):
    events, _, _ = train(settings, trial=True)
    assert any("the full run has 8 steps" in event.text for event in of(events, Notice))
