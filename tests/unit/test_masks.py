"""Masked loss: where masks come from, how they are cut, and that what they leave out teaches nothing."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_trainer.config import build
from lora_trainer.dataset.crops import Sizes, views
from lora_trainer.dataset.items import Item, read_folder
from lora_trainer.dataset.masks import mask_tensor, weights
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.events import Notice, Started, Validated
from lora_trainer.hosts.standalone import FileModels
from lora_trainer.training import data
from lora_trainer.training.objectives import objective_of
from lora_trainer.training.segment import open_segment
from lora_trainer.training.step import Batch
from tests.unit.test_objectives import EPSILON, V, config
from tests.unit.test_run import of, train


def silent(event) -> None:
    pass


def left_half(size: tuple[int, int]) -> Image.Image:
    """White on the left, black on the right."""
    values = np.zeros((size[1], size[0]), np.uint8)
    values[:, : size[0] // 2] = 255
    return Image.fromarray(values)


@pytest.fixture
def masked(settings, tmp_path) -> dict:
    """p0 has a mask in mask_dir, p1 beside it, p2 is transparent; the others have none."""
    folder, masks = Path(settings["train_data_dir"]), tmp_path / "masks"
    masks.mkdir()
    left_half((64, 64)).save(masks / "p0.png")
    left_half((64, 64)).save(folder / "p1-masklabel.png")
    picture = Image.open(folder / "p2.png").convert("RGBA")
    picture.putalpha(left_half((64, 64)))
    picture.save(folder / "p2.png")
    return {**settings, "masked_loss": True, "mask_dir": str(masks), "unmasked_weight": 0.25}


def test_each_source_gives_its_masks_and_is_told(masked):
    events: list = []
    items = data.find(build(masked), events.append)
    found = {item.path.name: item.mask and item.mask.name for item in items.train}
    assert found == {
        "p0.png": "p0.png",
        "p1.png": "p1-masklabel.png",
        "p2.png": "p2.png",
        **dict.fromkeys(("p3.png", "p4.png", "p5.png")),
    }
    told = next(notice.text for notice in of(events, Notice) if notice.text.startswith("masks"))
    assert told == (
        "masks of 6 pictures: 3 have none and count wholly, 1 from mask_dir, 1 from …-masklabel.png, "
        "1 by their transparency"
    )


def test_masks_are_no_pictures_to_train_on(masked):
    folder = Path(masked["train_data_dir"])
    contents = read_folder(folder)
    assert "p1-masklabel.png" not in {path.name for path in (*contents.images, *contents.others)}
    assert len(contents.images) == 6


def test_without_any_mask_it_says_what_it_looked_for(settings, tmp_path):
    with pytest.raises(DataError, match=r"masked_loss: expected masks: mask_dir, p0-masklabel.png beside p0.png"):
        data.find(build(settings, {"masked_loss": True}), silent)
    with pytest.raises(DataError, match=r"mask_dir: expected a folder whose pictures are not trained on"):
        data.find(build(settings, {"masked_loss": True, "mask_dir": settings["train_data_dir"]}), silent)
    with pytest.raises(ConfigError, match="mask_dir: expected masked_loss beside it"):
        build(settings, {"mask_dir": str(tmp_path)})


def test_a_mask_beside_held_out_pictures_of_the_same_names_is_not_theirs(masked, tmp_path):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for name in ("p0", "p1"):
        Image.open(Path(masked["train_data_dir"]) / f"{name}.png").save(held_out / f"{name}.png")
        (held_out / f"{name}.txt").write_text("a picture")
    inside = Path(masked["mask_dir"]) / "held_out"
    inside.mkdir()
    left_half((64, 64)).save(inside / "p1.png")
    items = data.find(build(masked, {"validation_data_dir": str(held_out)}), silent)
    assert [item.mask for item in items.held_out] == [None, inside / "p1.png"]


@pytest.mark.parametrize("crop", ["center", "focus", "random"])
def test_a_mask_is_cut_as_its_picture_is(tmp_path, crop):
    """The picture is its own mask, so cutting, shrinking and mirroring must agree with averages of the views."""
    values = np.random.default_rng(3).integers(0, 256, (96, 200), dtype=np.uint8)
    picture = Image.fromarray(np.kron(values[:12, :25], np.ones((8, 8), np.uint8)))
    picture.save(tmp_path / "a.png")
    seen = views(picture, Sizes(64, crop=crop, crops=3, flip=True))
    got = mask_tensor(Item(tmp_path / "b.png", "", "", mask=tmp_path / "a.png"), seen, 8)
    assert got.shape == (len(seen), 8, 8) or got.shape[1] * got.shape[2] <= 64
    for view, mask in zip(seen, got, strict=True):
        cut = np.asarray(view.of(picture), np.float32)
        averaged = cut.reshape(cut.shape[0] // 8, 8, cut.shape[1] // 8, 8).mean(axis=(1, 3))
        # Lanczos and a mean differ by their ringing at edges, not by a shift.
        assert np.corrcoef(averaged.ravel(), mask.numpy().ravel())[0, 1] > 0.97
        mirrored = np.corrcoef(averaged[:, ::-1].ravel(), mask.numpy().ravel())[0, 1]
        assert mirrored < 0.7
    assert len(seen) == (6 if crop == "random" else 2)


def test_grey_counts_in_proportion():
    got = weights(torch.tensor([0, 51, 255], dtype=torch.uint8), 0.1)
    torch.testing.assert_close(got, torch.tensor([0.1, 0.28, 1.0]))


def test_transparency_is_read_upright_in_every_mode(tmp_path):
    from lora_trainer.dataset.images import load_alpha

    mask = left_half((8, 4))
    rgba = Image.new("RGB", (8, 4), "red")
    rgba.putalpha(mask)
    exif = Image.Exif()
    exif[0x0112] = 3
    rgba.save(tmp_path / "turned.png", exif=exif)
    turned = np.asarray(load_alpha(tmp_path / "turned.png"))
    assert turned[:, 4:].min() == 255
    assert turned[:, :4].max() == 0
    grey = Image.fromarray(np.where(np.asarray(mask) > 0, 1000, 7).astype(np.uint16))
    grey.save(tmp_path / "grey.png")
    # Older Pillows do not write the colour that is transparent in 16 bits.
    data, chunk = (tmp_path / "grey.png").read_bytes(), b"tRNS\x00\x07"
    whole = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "grey.png").write_bytes(data.replace(data[33:], whole + data[33:], 1))
    assert np.array_equal(load_alpha(tmp_path / "grey.png"), mask)
    palette = Image.fromarray(np.asarray(mask) // 255).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.array_equal(load_alpha(tmp_path / "palette.png"), mask)


@pytest.mark.parametrize("loss", ["l2", "l1", "huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", [EPSILON, V])
def test_what_is_masked_has_no_gradient_with_any_loss(loss, schedule):
    torch.manual_seed(0)
    predicted = torch.randn(3, 4, 8, 8, requires_grad=True)
    target, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    mask = (torch.rand(3, 1, 8, 8) < 0.5).float()
    objective = objective_of(config(loss_type=loss, min_snr_gamma=5), schedule)
    losses = objective(predicted, target, t, mask)
    (gradient,) = torch.autograd.grad(losses.sum(), predicted)
    covered = mask.expand_as(gradient)
    assert gradient[covered == 0].abs().max() == 0
    assert gradient[covered == 1].abs().min() > 0
    # The gradient of what counts is what it is without a mask.
    (plain,) = torch.autograd.grad(objective(predicted, target, t).sum(), predicted)
    torch.testing.assert_close(gradient[covered == 1], plain[covered == 1])
    torch.testing.assert_close(objective(predicted, target, t, torch.ones_like(mask)), objective(predicted, target, t))


def gradient_of(segment, batch: Batch) -> torch.Tensor:
    segment.trainables.grads.zero_()
    segment.forward_backward(batch)
    return segment.trainables.grads.clone()


def any_batch(mask: torch.Tensor | None) -> Batch:
    generator = torch.Generator().manual_seed(5)
    latents, eps = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    return Batch(
        latents,
        eps,
        torch.tensor([300, 700]),
        torch.full((2,), 0.5),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
        context=torch.randn(2, 77, 16, generator=generator),
        # What the network sees, whatever it is asked for.
        input_eps=eps.clone(),
        mask=mask,
    )


def test_the_masked_part_of_the_target_moves_no_bit_of_the_gradient(settings):
    """What is asked for in the masked part may be anything: the trained parameters never hear of it."""
    run = build(settings, {"gradient_checkpointing": True})
    mask = torch.ones(2, 1, 8, 8)
    mask[..., 4:] = 0
    batch = any_batch(mask)
    other = replace(batch, eps=torch.where(mask == 0, batch.eps + 3, batch.eps))
    seen = replace(batch, eps=torch.where(mask == 1, batch.eps + 3, batch.eps))
    with (
        FileModels(Path(run.base_model), torch.device("cpu"), torch.float32).borrow() as model,
        open_segment(run, model, None) as segment,
    ):
        # A fresh LoRA's up is zero, so that only its gradient would be there.
        segment.trainables.masters.add_(0.01)
        segment.working.refresh()
        first = gradient_of(segment, batch)
        assert first.abs().max() > 0
        assert torch.equal(first, gradient_of(segment, other))
        assert not torch.equal(first, gradient_of(segment, seen))
        assert not torch.equal(first, gradient_of(segment, replace(other, mask=torch.ones_like(mask))))


def test_parts_of_a_batch_keep_their_masks():
    mask = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    parts = any_batch(mask).split(2)
    assert [part.mask.unique().item() for part in parts] == [0, 1]


def test_a_run_learns_and_measures_by_its_masks(masked):
    with_masks, lora = train(masked, validation_split=0.34, epochs=1)
    without, other = train(masked, masked_loss=False, mask_dir=None, validation_split=0.34, epochs=1)
    assert of(with_masks, Started)[0].images == 4
    assert lora != other
    assert of(with_masks, Validated)[0].base < of(without, Validated)[0].base


def test_white_masks_are_as_good_as_none(settings, tmp_path):
    masks = tmp_path / "white"
    masks.mkdir()
    for index in range(6):
        Image.new("L", (64, 64) if index < 4 else (128, 64), 255).save(masks / f"p{index}.png")
    events, _ = train(settings, masked_loss=True, mask_dir=str(masks), unmasked_weight=0, epochs=1)
    plain, _ = train(settings, epochs=1)
    losses = [[event.loss for event in each if type(event).__name__ == "StepDone"] for each in (events, plain)]
    assert losses[0] == losses[1]


def test_the_cache_keeps_masks_apart(masked, tmp_path):
    changes = {"cache_dir": str(tmp_path / "cache"), "epochs": 1}
    _, first = train(masked, **changes)
    latents = set((tmp_path / "cache").rglob("*.safetensors"))
    _, again = train(masked, **changes)
    assert again == first
    assert set((tmp_path / "cache").rglob("*.safetensors")) == latents
    Image.new("L", (64, 64), 255).save(Path(masked["mask_dir"]) / "p0.png")
    _, changed = train(masked, **changes)
    assert changed != first
    # The picture itself is not encoded again: there is one new mask.
    assert len(set((tmp_path / "cache").rglob("*.safetensors")) - latents) == 1


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (
            lambda path: left_half((32, 64)).save(path),
            "expected the 64×64 pixels of p0.png, whose mask it is, found 32×64",
        ),
        (lambda path: path.write_bytes(b"no picture"), "is no picture that is read"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be decoded"),
    ],
)
def test_a_mask_that_cannot_be_used_leaves_its_picture_out(masked, spoil, why):
    path = Path(masked["mask_dir"]) / "p0.png"
    spoil(path)
    events, _ = train(masked, epochs=1)
    told = [notice.text for notice in of(events, Notice) if notice.text.startswith("skipped")]
    assert len(told) == 1
    assert str(path) in told[0]
    assert why in told[0]
    assert of(events, Started)[0].images == 5
