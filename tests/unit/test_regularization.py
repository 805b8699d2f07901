"""Prior preservation: which regularisation pictures an epoch sees, how much they count, and where they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_trainer.config import build
from lora_trainer.config.export import to_header
from lora_trainer.dataset.items import Item
from lora_trainer.doctor import examine
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.events import Notice, Started, StepDone, Validated
from lora_trainer.hosts.roots import Roots
from lora_trainer.hosts.standalone import FileModels
from lora_trainer.training import data, resume, trial
from lora_trainer.training.feed import Feed
from lora_trainer.training.judging import watched
from lora_trainer.training.regularization import balanced
from tests.unit.test_concepts import train
from tests.unit.test_run import of


def silent(event) -> None:
    pass


def drawn(folder: Path, count: int, *captions: str, first: int = 50) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        values = np.random.default_rng(first + index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"r{index}.png")
        if captions:
            (folder / f"r{index}.txt").write_text(captions[index % len(captions)])
    return folder


@pytest.fixture
def kept(settings, tmp_path) -> dict:
    folder = drawn(tmp_path / "reg", 4, "a person", "a man")
    return {**settings, "trigger_words": "sks", "reg_data_dir": str(folder), "prior_loss_weight": 0.5}


@pytest.mark.parametrize(
    ("repeats", "total", "expected"),
    [
        ([1, 1, 1, 1], 6, [2, 2, 1, 1]),
        ([1, 1, 1, 1], 8, [2, 2, 2, 2]),
        ([1, 1, 1, 1], 3, [1, 1, 1]),
        ([3, 1], 2, [3]),
        ([2, 1], 9, [5, 4]),
        ([1], 5, [5]),
    ],
)
def test_an_epoch_sees_as_many_of_them(repeats, total, expected):
    """As kohya's DreamBoothDataset registers them."""
    items = [Item(Path(str(number)), "", "", repeats=count) for number, count in enumerate(repeats)]
    assert [item.repeats for item in balanced(items, total)] == expected
    assert balanced(items, total) == kohyas(items, total)


def kohyas(items: list[Item], total: int) -> list[Item]:
    counts: dict[int, int] = {}
    seen, first = 0, True
    while seen < total:
        for number, item in enumerate(items):
            if first:
                counts[number] = item.repeats
                seen += item.repeats
            else:
                counts[number] += 1
                seen += 1
            if seen >= total:
                break
        first = False
    return [replace(items[number], repeats=count) for number, count in counts.items()]


def test_they_have_no_trigger_words_and_their_weight(kept):
    events: list = []
    items = data.find(build(kept, {"validation_split": 0.34}), events.append)
    assert all(item.caption.startswith("sks, ") for item in items.train)
    assert [item.caption for item in items.regularization] == ["a person", "a man", "a person", "a man"]
    assert {item.weight for item in items.regularization} == {0.5}
    assert sum(item.repeats for item in items.regularization) == len(items.train) == 4
    assert not any(item.prior for item in (*items.train, *items.held_out))
    told = [notice.text for notice in of(events, Notice) if notice.text.startswith("regularisation")]
    assert told == [f"regularisation: 4 pictures of {kept['reg_data_dir']}: an epoch sees 4 of them beside 4 to learn"]


def test_their_loss_counts_by_their_weight(kept):
    """Each of a batch weighs 1 / batch, times prior_loss_weight where it is a regularisation picture."""
    config = build(kept)
    items = data.find(config, silent)
    with FileModels(Path(config.base_model), torch.device("cpu"), torch.float32).borrow() as model:
        loaded = data.load(items, config, model, sink=silent)
        captions = loaded.train.captions(model.text.tokens)
    feed = Feed(loaded.train.epoch, captions, 2, 1, 1, 1000)
    assert feed.batches_per_epoch == (4 + 6 + 2) // 2
    weights = [
        batch.weight.tolist()
        for _, update in zip(range(6), feed.updates(0), strict=False)
        for batch in feed.batches(update)
    ]
    flat = sorted(weight for batch in weights for weight in batch)
    assert flat == [0.25] * 6 + [0.5] * 6


def test_a_run_counts_them_nowhere_but_in_the_header(kept):
    events, _, metadata = train(kept, validation_split=0.34)
    plain, _, without = train(kept, validation_split=0.34, reg_data_dir=None)
    assert of(events, Started)[0].images == 4
    assert of(events, Started)[0].steps == 2 * of(plain, Started)[0].steps
    assert of(events, Validated)[0].base == of(plain, Validated)[0].base
    for key in ("ss_num_train_images", "ss_bucket_info", "ss_dataset_dirs", "ss_tag_frequency"):
        assert metadata[key] == without[key]
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"reg": {"n_repeats": 1, "img_count": 4}}
    assert (metadata["ss_num_reg_images"], without["ss_num_reg_images"]) == ("4", "0")
    assert (metadata["ss_prior_loss_weight"], without["ss_reg_dataset_dirs"]) == ("0.5", "{}")


def test_weight_0_trains_on_the_others_alone(kept):
    """With one step over everything the regularisation pictures only thin the gradient, whose length Adam forgets."""
    one = {"batch_size": 8, "max_train_steps": 1, "lora_dropout": 0, "max_grad_norm": 0, "extra_resolutions": []}
    for picture in ("p4", "p5"):
        (Path(kept["train_data_dir"]) / f"{picture}.png").unlink()
    rows = (Path(kept["train_data_dir"]) / "metadata.csv").read_text().splitlines()[:4]
    (Path(kept["train_data_dir"]) / "metadata.csv").write_text("\n".join(rows))
    losses = [of(train(kept, **one, prior_loss_weight=weight)[0], StepDone)[0].loss for weight in (0, 1)]
    assert 0.4 < losses[0] / losses[1] < 0.6


def test_concepts_have_their_own(settings, tmp_path):
    home = Path(settings["train_data_dir"])
    drawn(home / "castle", 2, "a castle")
    drawn(home / "knight", 3, "a knight", first=70)
    drawn(home / "castles", 1, first=80)
    common = drawn(tmp_path / "common", 5, "something", first=90)
    concepts = [
        {"folder": "castle", "repeats": 3, "caption": "castle", "regularization": "castles"},
        {"folder": "knight"},
    ]
    settings = {**settings, "concepts": concepts, "reg_data_dir": str(common)}
    config = build(settings)
    items = data.find(config, silent)
    assert [(item.path.parent.name, item.caption, item.repeats) for item in items.regularization] == [
        ("castles", "castle", 6),
        *[("common", "something", 1)] * 3,
    ]
    assert json.loads(to_header(config))["concepts"] == concepts
    private = json.loads(
        to_header(build(settings, {"concepts": [{"folder": "castle", "regularization": "/my/castles"}]}))
    )
    assert private["concepts"] == [{"folder": "castle", "regularization": "castles"}]
    with pytest.raises(ConfigError, match="concepts, entry 1: expected a folder as regularization, found nothing"):
        build(settings, {"concepts": [{"folder": "castle", "regularization": " "}]})
    with pytest.raises(ConfigError, match="allowed folders"):
        Roots([home], enforced=True).settings(
            {"train_data_dir": str(home), "concepts": [{"folder": "castle", "regularization": str(common)}]}
        )


def test_folders_of_kohyas_form_give_class_words(settings, tmp_path):
    drawn(tmp_path / "reg" / "2_a_woman", 2)
    settings = {**settings, "preservation_prompt": "a person"}
    items = data.find(build(settings, {"reg_data_dir": str(tmp_path / "reg")}), silent)
    assert [(item.caption, item.repeats) for item in items.regularization] == [("a woman", 3), ("a woman", 3)]
    items = data.find(build(settings, {"reg_data_dir": str(tmp_path / "reg" / "2_a_woman")}), silent)
    assert [(item.caption, item.repeats) for item in items.regularization] == [("a person", 3), ("a person", 3)]


def test_what_is_learned_is_no_regularisation_picture(settings):
    inside = drawn(Path(settings["train_data_dir"]) / "reg", 1, "x")
    for folder in (inside, inside.parent):
        with pytest.raises(
            DataError, match="regularisation pictures: expected a folder whose pictures are not trained on"
        ):
            data.find(build(settings, {"reg_data_dir": str(folder)}), silent)
    with pytest.raises(DataError, match="no such folder"):
        data.find(build(settings, {"reg_data_dir": str(inside / "none")}), silent)


def test_the_doctor_does_not_see_them(kept):
    assert len(examine(Path(kept["train_data_dir"])).pictures) == 6


def test_a_resumed_run_has_the_same_ones(kept):
    config = build(kept)
    before = resume.digest(data.find(config, silent))
    assert before != resume.digest(data.find(build(kept, {"reg_data_dir": None}), silent))
    (Path(kept["reg_data_dir"]) / "r1.txt").write_text("another")
    assert resume.digest(data.find(config, silent)) != before


def test_the_trial_counts_them(kept):
    items = data.find(build(kept), silent)
    told = trial.forecast(build(kept), items, trial.Measured(step=1))
    # Six of each, in batches of two, twice.
    assert "the full run has 12 steps" in told
    assert len(trial.shorten(build(kept), items)[1].regularization) == 4


def test_they_are_not_among_the_training_pictures_that_are_watched(kept):
    config = build(kept)
    with FileModels(Path(config.base_model), torch.device("cpu"), torch.float32).borrow() as model:
        loaded = data.load(data.find(config, silent), config, model, sink=silent)
    assert {sample.item.prior for sample in loaded.train.samples} == {False, True}
    assert not any(sample.item.prior for sample in watched(loaded.train, 10, 0))
