"""Captions that change from visit to visit: how they are read, encoded ahead or in the step, and that runs repeat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_trainer.config import build
from lora_trainer.dataset.captions import read_metadata
from lora_trainer.dataset.items import scan
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.events import Notice, StepDone, Validated
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.text import TextEncoder
from lora_trainer.training import wording
from lora_trainer.training.data import find, load
from lora_trainer.training.feed import Feed
from lora_trainer.training.segment import open_segment
from tests.unit.test_resume import Run, at_step
from tests.unit.test_run import of, train, weights

MANY = "alpha, beta, gamma, delta, epsilon, zeta"
SHUFFLED = {"shuffle_captions": True, "keep_tokens": 1, "tag_dropout": 0.2, "caption_dropout": 0.2}


@pytest.fixture
def many(settings, pictures) -> dict:
    """Captions with more orders than are kept; every second one takes two chunks of tokens."""
    rows = [f'p{n}.png,"picture {n}, {", ".join([MANY] * (8 if n % 2 else 1))}"' for n in range(6)]
    (pictures / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    return settings


@pytest.fixture
def few(settings, pictures) -> dict:
    """Captions of one and of two chunks, with a choice in each."""
    rows = [f'p{n}.png,"a {{red|blue}} picture{" and so on" * (40 if n % 2 else 1)}"' for n in range(6)]
    (pictures / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    return settings | {"wildcards": True, "caption_dropout": 0.3}


def open_tiny(settings):
    return open_model(Path(settings["base_model"]), torch.device("cpu"))


def told(events, words: str) -> bool:
    return any(words in notice.text for notice in of(events, Notice))


def feed_of(settings, **changes):
    """(feed, prepared samples, model) of a run."""
    config = build(settings, changes)
    model = open_tiny(settings)
    data = load(find(config, lambda event: None), config, model, sink=lambda event: None).train
    captions = data.captions(model.text.tokens)
    return Feed(data.samples, captions, config.batch_size, 1, config.seed, model.noise.timesteps), data, model


# --- reading


def test_several_captions_and_weights_in_rows(tmp_path):
    rows = [
        {"file_name": "a.png", "text": ["a  cat", " ", "the cat"], "weight": 0.5},
        {"file_name": "b.png", "text": "x"},
    ]
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found, _ = read_metadata(path)
    assert [(row.caption, row.weight) for row in found] == [("a cat\nthe cat", 0.5), ("x", 1.0)]
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,weight,text\na.png,2,a cat\nb.png,,a dog\n", encoding="utf-8")
    found, notes = read_metadata(table)
    assert [(row.caption, row.weight) for row in found] == [("a cat", 2.0), ("a dog", 1.0)]
    assert notes == []


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "101", "much", True, [1], None])
def test_weights_that_are_none_are_refused(tmp_path, weight):
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps({"file_name": "a.png", "text": "x", "weight": weight}), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: expected a weight of more than 0 and at most 100, found"):
        read_metadata(path)


def test_lines_of_a_text_file_are_captions_where_that_is_asked_for(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_text("a cat \r\n\r\n the  cat\n", encoding="utf-8")
    assert [item.caption for item in scan(tmp_path).items] == ["a cat the cat"]
    assert [item.caption for item in scan(tmp_path, lines=True).items] == ["a cat\nthe cat"]
    with_words = scan(tmp_path, lines=True, trigger_words="cat, sks").items
    assert [item.caption for item in with_words] == ["cat, sks, a cat\ncat, sks, the cat"]


def test_keep_tokens_alone_is_refused(settings):
    with pytest.raises(ConfigError, match="keep_tokens: expected shuffle_captions or tag_dropout beside it"):
        build(settings, {"keep_tokens": 1})


# --- encoded ahead, or in the step


def test_few_captions_are_encoded_ahead_and_many_in_the_step(few, many):
    _, ahead, _ = feed_of(few | {"caption_dropout": 0.0})
    assert ahead.texts is not None
    many = many | {"wildcards": False, "caption_dropout": 0.0}
    _, live, _ = feed_of(many, shuffle_captions=True)
    assert live.texts is None
    assert feed_of(many)[1].texts.keys() == {sample.item.caption for sample in live.samples}


def test_which_one_is_said(few, pictures):
    events, _ = train(few, max_train_steps=1)
    # Two colours, short and long, and the empty caption.
    assert told(events, "captions: all 5 of 6 pictures")
    (pictures / "metadata.csv").write_text("".join(f'p{n}.png,"{MANY}"\n' for n in range(6)), encoding="utf-8")
    events, _ = train(few, shuffle_captions=True, max_train_steps=1)
    assert told(events, "captions: a picture has more than 32 captions, so the text encoder runs in each step")
    events, _ = train(few, wildcards=False, caption_dropout=0, max_train_steps=1)
    assert not told(events, "captions:")


def test_too_many_bytes_are_too_many_too(few, monkeypatch):
    monkeypatch.setattr(wording, "MOST_BYTES", 1000)
    events, _ = train(few, max_train_steps=1)
    assert told(events, "GiB encoded, so the text encoder runs in each step")


def test_both_ways_give_the_same_batches_and_the_same_losses(few, monkeypatch):
    ahead, _, model = feed_of(few)
    batches = [batch for update in _first(ahead, 6) for batch in ahead.batches(update)]
    expected, _ = train(few, max_train_steps=2)
    monkeypatch.setattr(wording, "MOST_BYTES", 1000)
    live, _, _ = feed_of(few)
    lengths = set()
    for batch, other in zip(batches, (b for update in _first(live, 6) for b in live.batches(update)), strict=True):
        assert (batch.ids, other.context) == (None, None)
        lengths.add(other.ids.shape[1])
        encoded = torch.cat([model.text.encode(ids) for ids in other.ids])
        torch.testing.assert_close(encoded, batch.context, rtol=0, atol=1e-5)
        assert batch.shape == other.shape
    assert lengths == {1, 2}
    events, _ = train(few, max_train_steps=2)
    losses, others = ([step.loss for step in of(e, StepDone)] for e in (expected, events))
    assert losses == pytest.approx(others, rel=1e-4)


def _first(feed, count):
    stream = feed.updates(0)
    return [next(stream) for _ in range(count)]


def test_a_frozen_encoder_in_the_step_takes_no_gradient(many):
    feed, _, _ = feed_of(many, **SHUFFLED)
    batch = next(feed.batches(_first(feed, 1)[0]))
    model = open_tiny(many)
    # As the WebUI's own are.
    model.text.module.requires_grad_(True)
    with open_segment(build(many, SHUFFLED), model, None) as segment:
        assert set(segment.adapters) == {"unet"}
        assert not segment.network.encode(batch.ids).context.requires_grad
        segment.forward_backward(batch)
        assert segment.trainables.grads.any()
    assert all(parameter.grad is None for parameter in model.text.module.parameters())


def test_the_held_out_captions_stay_as_they_are_written(many):
    still = {"validation_split": 0.34, "max_train_steps": 1, "resolution": 64}
    (base, last), (other, _) = (of(train(many, **still, **rule)[0], Validated)[:2] for rule in (SHUFFLED, {}))
    assert base.base == other.base
    assert last.base == base.base


def test_an_empty_caption_is_shown_as_often_as_asked_for(many):
    seen = []
    feed, data, model = feed_of(many, caption_dropout=0.25, epochs=1)
    empty = model.text.context("")["context"]
    for update in _first(feed, 150):
        for batch in feed.batches(update):
            real = batch.context[batch.weight > 0]
            seen += [torch.equal(context[: len(empty)], empty) for context in real]
    assert sum(seen) / len(seen) == pytest.approx(0.25, abs=0.05)
    assert data.texts.keys() >= {""}


def test_the_text_encoder_is_asked_once_for_each_caption(few, monkeypatch):
    asked, context = [], TextEncoder.context
    monkeypatch.setattr(TextEncoder, "context", lambda self, text: asked.append(text) or context(self, text))
    _, data, _ = feed_of(few)
    # Once more to see how large one is.
    asked.remove("")
    assert sorted(asked) == sorted(data.texts)


# --- weights


def test_a_picture_counts_as_much_as_its_weight_says(settings, pictures):
    rows = "".join(f"p{n}.png,picture {n},{2 if n == 1 else 0.5}\n" for n in range(6))
    (pictures / "metadata.csv").write_text(f"file,text,weight\n{rows}", encoding="utf-8")
    feed, data, _ = feed_of(settings)
    for update in _first(feed, 3):
        real = sum(sum(batch.weights) for batch in update.batches)
        for batch, made in zip(update.batches, feed.batches(update), strict=True):
            expected = [
                weight * (2 if data.samples[index].item.path.stem == "p1" else 0.5) / real
                for index, weight in zip(batch.indices, batch.weights, strict=True)
            ]
            assert made.weight.tolist() == pytest.approx(expected)


# --- runs


@pytest.mark.parametrize("trained", [False, True])
def test_a_killed_run_goes_on_with_the_same_captions(many, tmp_path, trained):
    changes = SHUFFLED | {"train_text_encoder": trained}
    expected = Run(many | {"output_dir": str(tmp_path / "other")})(**changes)
    job = Run(many)
    job.killed(at_step(3), **changes)
    assert job(**changes) == expected


@pytest.mark.parametrize("tags", [MANY, "{red|blue}, alpha"])
def test_batches_and_accumulation_are_the_same_mathematics(settings, pictures, tags):
    (pictures / "metadata.csv").write_text("".join(f'p{n}.png,"{tags}"\n' for n in range(6)), encoding="utf-8")
    whole = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        sizes = {"batch_size": size, "gradient_accumulation_steps": accumulation, "resolution": 64, "epochs": 1}
        events, _ = train(settings | SHUFFLED, **sizes, validation_split=0.33, wildcards=True)
        assert told(events, "each step") == (tags == MANY)
        (step,) = of(events, StepDone)
        whole.append(step)
    assert all(step.loss == pytest.approx(whole[0].loss, rel=1e-5) for step in whole)
    assert all(step.grad_norm == pytest.approx(whole[0].grad_norm, rel=1e-4) for step in whole)


def test_rules_that_find_nothing_to_do_change_no_byte(settings):
    short = {"max_train_steps": 2, "resolution": 64}
    _, data = train(settings, **short)
    assert weights(train(settings, **short, wildcards=True)[1]) == weights(data)
    assert weights(train(settings, **short, caption_prefix="photo of")[1]) != weights(data)


def test_header_and_log_name_what_was_done(settings):
    _, data = train(settings, shuffle_captions=True, keep_tokens=1, caption_dropout=0.1, epochs=1)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert header["ss_shuffle_caption"] == "True"
    assert header["ss_keep_tokens"] == "1"
    assert header["ss_caption_dropout_rate"] == "0.1"
    assert json.loads(header["ss_tag_frequency"])["pictures"] == {"picture": 6, **{f"number {n}": 1 for n in range(6)}}


def test_what_cannot_be_read_in_the_step_is_said_before_the_first(many, monkeypatch):
    def tokens(self, caption):
        if "zeta" in caption:
            raise DataError("caption_syntax: no tokens")
        return {"ids": self.tokenize(caption)}

    monkeypatch.setattr(TextEncoder, "tokens", tokens)
    config = build(many, SHUFFLED | {"caption_syntax": "webui"})
    with pytest.raises(DataError, match="no tokens"):
        load(find(config, lambda e: None), config, open_tiny(many), sink=lambda e: pytest.fail("it began"))
