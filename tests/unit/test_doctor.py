"""The doctor: each finding on a small folder, and none on a good one."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from lora_trainer.cli import main
from lora_trainer.doctor import Finding, Report, examine, pictures
from lora_trainer.doctor.findings import KINDS
from lora_trainer.doctor.subject import Wanted
from lora_trainer.doctor.text import lines
from lora_trainer.errors import DataError
from tests.spoiled import encoded, scene

TWEMOJI = Path(__file__).parents[2] / "demo" / "twemoji"


@cache
def good(seed: int) -> bytes:
    return encoded(scene(seed), "PNG")


def album(folder: Path, count: int, caption: str = "a sks castle, view {}", first: int = 0) -> Path:
    """`count` different good pictures with a row each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(first, first + count):
        (folder / f"p{index}.png").write_bytes(good(index))
        rows.append(f'p{index}.png,"{caption.format(index)}"')
    (folder / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


def caption(folder: Path, **captions: str) -> None:
    """Rows of their own for the pictures `captions` names, in place of those they had."""
    kept = [row for row in (folder / "metadata.csv").read_text().splitlines() if row.split(".")[0] not in captions]
    kept += [f'{name}.png,"{text}"' for name, text in captions.items()]
    (folder / "metadata.csv").write_text("\n".join(kept), encoding="utf-8")


def report(folder: Path, **wanted: object) -> Report:
    return examine(folder, wanted=Wanted(**{"resolution": 128, **wanted}))


def found(folder: Path, **wanted: object) -> dict[str, list[Finding]]:
    kinds = defaultdict(list)
    for finding in report(folder, **wanted).findings:
        kinds[finding.kind].append(finding)
    return kinds


def only(kinds: dict[str, list[Finding]], kind: str) -> tuple[list[str], str]:
    """(file names, reason) of the one finding of a kind; beside it the count of pictures may be told."""
    assert set(kinds) <= {kind, "count"}
    (finding,) = kinds[kind]
    return sorted(file.name for file in finding.files), finding.reason


# Good folders


def test_a_good_folder_has_nothing_to_mend(tmp_path):
    good = report(album(tmp_path, 50))
    assert good.findings == ()
    assert (len(good.pictures), good.looked_at, good.usable) == (50, 50, 50)
    assert list(lines(good)) == [
        f"{tmp_path}: 50 pictures, 50 can be trained on at 128 px; nothing to mend",
    ]


def test_the_demo_is_found_to_be_what_it_is():
    """120 icons: two of them are one drawing under two names, and all are square. Nothing else."""
    kinds = found(TWEMOJI)
    assert set(kinds) == {"near-duplicate", "square"}
    (twins,) = kinds["near-duplicate"]
    assert sorted(file.name for file in twins.files) == ["025-purple-heart.png", "048-blue-heart.png"]
    assert report(TWEMOJI).count("error") == 0
    assert set(found(TWEMOJI, resolution=512)) == {"near-duplicate", "square", "small"}


# Files


def test_no_folder_and_no_pictures(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        report(tmp_path / "missing")
    names, reason = only(found(tmp_path), "no-pictures")
    assert names == []
    assert reason.startswith("expected pictures")


def test_a_sub_folder_that_cannot_be_read(tmp_path, monkeypatch):
    closed = album(tmp_path, 50) / "closed"
    closed.mkdir()
    listed = Path.iterdir

    def iterdir(self):
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert only(found(tmp_path), "folder") == (["closed"], "cannot be read: Permission denied")


def test_every_mistake_of_a_caption_file_is_named(tmp_path):
    rows = album(tmp_path, 50) / "metadata.csv"
    rows.write_text(rows.read_text() + '\np0.png,again\nghost.png,gone\n../a.png,"out"\n')
    reasons = [finding.reason for finding in found(tmp_path)["caption-file"]]
    assert len(reasons) == 3
    for words in ("lines 1 and 51", "ghost.png", "inside the folder"):
        assert any(words in reason for reason in reasons)


def test_with_a_broken_caption_file_names_do_not_serve(tmp_path):
    (album(tmp_path, 50) / "metadata.csv").write_text('p0.png,"a castle')
    kinds = found(tmp_path)
    assert len(kinds["caption-missing"]) == 50
    assert "caption-name" not in kinds


def test_captions_without_a_picture(tmp_path):
    (album(tmp_path, 50) / "p99.txt").write_text("notes")
    assert found(tmp_path) == {}
    (tmp_path / "p1.txt").write_text("a caption")
    assert only(found(tmp_path), "caption-orphan")[0] == ["p99.txt"]


# Captions


def test_captions_made_from_names(tmp_path):
    (album(tmp_path, 50) / "metadata.csv").unlink()
    _, reason = only(found(tmp_path, trigger_words="sks"), "caption-name")
    assert "no captions were found" in reason


@pytest.mark.parametrize("text", ["nice photo", "Image 12", "a picture of something", "IMG_0001", "很好", "?"])
def test_captions_that_could_be_any_picture(tmp_path, text):
    caption(album(tmp_path, 50), p3=text)
    kinds = found(tmp_path, trigger_words="castle")
    assert ("caption-generic" in kinds) == (text != "很好")


@pytest.mark.parametrize("text", ["castle", "a photo of a castle", "the beautiful castle", "城堡", "a test tube"])
def test_captions_that_say_something(tmp_path, text):
    caption(album(tmp_path, 50), p3=text)
    assert "caption-generic" not in found(tmp_path)


def test_one_caption_for_many(tmp_path):
    folder = album(tmp_path, 50)
    caption(folder, p1="a sks castle", p2="A sks castle")
    assert found(folder) == {}
    caption(folder, p3="a sks castle")
    names, reason = only(found(folder), "caption-identical")
    assert names == ["p1.png", "p2.png", "p3.png"]
    assert reason.startswith('3 pictures (6%) have the caption "')


def test_what_nearly_all_captions_have(tmp_path):
    folder = album(tmp_path, 50)
    caption(folder, p1="castle by night", p2="castle in the rain")
    names, reason = only(found(folder), "trigger")
    assert names == ["p1.png", "p2.png"]
    assert '48 of 50 captions have "a sks castle"' in reason


def test_no_word_to_call_it_by(tmp_path):
    folder = album(tmp_path, 50, caption="{} towers of some castle")
    assert only(found(folder), "trigger")[1] == "no word begins nearly all captions"
    assert found(folder, trigger_words="sks") == {}


def test_trigger_words_that_some_captions_have(tmp_path):
    folder = album(tmp_path, 50)
    caption(folder, p1="castle by night")
    names, reason = only(found(folder, trigger_words="sks castle"), "trigger")
    assert names == ["p1.png"]
    assert "1 of 50 captions lack" in reason


def test_tags_that_appear_once(tmp_path):
    folder = album(tmp_path, 50, caption="sks, castle, stone wall, tower")
    caption(folder, **{f"p{index}": f"sks, castle, stone wall, tower {index % 10}" for index in range(50)})
    assert set(found(folder)) == {"caption-identical"}
    caption(folder, p7="sks, castle, stonne wall, dragon")
    names, reason = only({k: v for k, v in found(folder).items() if k != "caption-identical"}, "tag-once")
    assert names == ["p7.png"]
    assert reason == "2 of 15 tags are in one caption only: stonne wall (stone wall?), dragon"


# What pictures show


def test_small_and_large_for_the_resolution(tmp_path):
    folder = album(tmp_path, 50)
    scene(7, (100, 100)).save(folder / "p7.png")
    names, reason = only(found(folder), "small")
    assert names == ["p7.png"]
    assert reason.startswith("100×100, so it is trained at 64×64 instead of 128×128")
    assert found(folder, resolution=64) == {}


def test_too_small_for_training(tmp_path):
    folder = album(tmp_path, 50)
    scene(7, (100, 63)).save(folder / "p7.png")
    assert only(found(folder), "tiny") == (["p7.png"], "is too small: expected at least 64 pixels a side, found 100×63")
    assert report(folder).usable == 49


def test_long_pictures(tmp_path):
    folder = album(tmp_path, 50)
    scene(7, (800, 200)).save(folder / "p7.png")
    assert found(folder) == {}
    scene(8, (200, 1000)).save(folder / "p8.png")
    assert only(found(folder), "aspect") == (["p8.png"], "200×1000: 20% of it is cut off at both ends")


def test_blur(tmp_path):
    folder = album(tmp_path, 50)
    scene(7, (500, 500)).filter(ImageFilter.GaussianBlur(3)).save(folder / "p7.png")
    # A sharp thing before a blurred background, and a drawing on empty paper, are sharp.
    portrait = scene(8, (500, 500)).filter(ImageFilter.GaussianBlur(9))
    portrait.paste(scene(9, (200, 200)), (150, 150))
    portrait.save(folder / "p8.png")
    drawing = Image.new("RGB", (500, 500), "ivory")
    ImageDraw.Draw(drawing).ellipse((220, 220, 280, 280), fill="navy")
    drawing.save(folder / "p9.png")
    assert only(found(folder), "blurry")[0] == ["p7.png"]


def test_blank(tmp_path):
    folder = album(tmp_path, 50)
    Image.new("RGB", (200, 200), "gray").save(folder / "p7.png")
    assert only(found(folder), "blank")[0] == ["p7.png"]


@pytest.mark.parametrize("upright", [False, True])
def test_bars(tmp_path, upright):
    folder = album(tmp_path, 50)
    film = scene(7, (400, 400))
    draw = ImageDraw.Draw(film)
    for first, last in ((0, 39), (360, 400)):
        draw.rectangle((first, 0, last, 400) if upright else (0, first, 400, last), fill=(16, 16, 16))
    film.save(folder / "p7.png")
    # Paper above and below a drawing is none, nor is one sky.
    drawing = Image.new("RGB", (400, 400), "ivory")
    ImageDraw.Draw(drawing).rectangle((60, 100, 340, 300), fill="navy")
    drawing.save(folder / "p8.png")
    sky = scene(9, (400, 400))
    ImageDraw.Draw(sky).rectangle((0, 0, 400, 150), fill="skyblue")
    sky.save(folder / "p9.png")
    names, reason = only(found(folder), "bars")
    assert names == ["p7.png"]
    assert "take 2" in reason or "take 1" in reason


# Several pictures


def test_the_same_picture_twice(tmp_path):
    folder = album(tmp_path, 50)
    # Another file of the same pixels.
    scene(3).save(folder / "p7.png", compress_level=0)
    assert only(found(folder), "duplicate") == (
        ["p3.png", "p7.png"],
        "the very same picture 2 times, learned as often; their captions differ",
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((150, 125)).resize(image.size),
        lambda image: image.point(lambda value: min(255, value * 1.15)),
        lambda image: image.crop((2, 1, 190, 158)),
    ],
)
def test_nearly_the_same_picture(tmp_path, change):
    folder = album(tmp_path, 50)
    change(scene(3)).save(folder / "p7.png")
    assert only(found(folder), "near-duplicate")[0] == ["p3.png", "p7.png"]


def test_a_mark_on_many(tmp_path):
    folder = album(tmp_path, 50)
    for index in range(30):
        image = scene(index)
        ImageDraw.Draw(image).text((110, 142), "(c) AGENCY", fill="white")
        image.save(folder / f"p{index}.png")
    names, reason = only(found(folder), "watermark")
    assert "bottom right of" in reason
    assert "left" not in reason
    assert "top" not in reason
    marked = {f"p{index}.png" for index in range(30)}
    assert len(marked & set(names)) >= 25
    assert len(set(names) - marked) <= 2


def test_concepts_of_unequal_size(tmp_path):
    album(tmp_path / "10_castle", 30)
    album(tmp_path / "dragon", 20, first=30)
    assert found(tmp_path) == {}
    for index in range(32, 50):
        (tmp_path / f"dragon/p{index}.png").rename(tmp_path / f"10_castle/p{index}.png")
    for place in ("10_castle", "dragon"):
        rows = [f'{file.name},"a sks castle, view {file.stem}"' for file in (tmp_path / place).glob("*.png")]
        (tmp_path / place / "metadata.csv").write_text("\n".join(rows))
    _, reason = only(found(tmp_path), "imbalance")
    assert reason == "pictures by folder: 10_castle 48, dragon 2"
    (tmp_path / "dragon").rename(tmp_path / "2_dragon")
    _, reason = only(found(tmp_path), "imbalance")
    assert reason == "visits an epoch by folder: 10_castle 480, 2_dragon 4"
    (tmp_path / "2_dragon").rename(tmp_path / "200_dragon")
    assert "imbalance" not in found(tmp_path)


def test_concepts_by_their_first_tag(tmp_path):
    folder = album(tmp_path, 50, caption="sks castle, view {}")
    caption(folder, **{f"p{index}": f"sks dragon, view {index}" for index in range(10)})
    assert "imbalance" in found(folder, trigger_words="sks")
    caption(folder, **{f"p{index}": f"sks dragon, view {index}" for index in range(20)})
    assert found(folder, trigger_words="sks") == {}


@pytest.mark.parametrize(("count", "level"), [(5, "warning"), (20, "advice"), (50, None), (201, "advice")])
def test_how_many(tmp_path, count, level):
    findings = report(album(tmp_path, count)).findings
    assert [(finding.kind, finding.level) for finding in findings] == ([("count", level)] if level else [])


def test_everything_is_square(tmp_path):
    folder = album(tmp_path, 50)
    for index in range(50):
        scene(index, (160, 160)).save(folder / f"p{index}.png")
    assert only(found(folder), "square")[1].startswith("all 50 pictures are square")


# The whole


def test_many_pictures_with_little_time(tmp_path):
    folder = album(tmp_path, 30)
    told = []
    half = examine(folder, wanted=Wanted(128), sink=told.append, most_seconds=-1)
    assert half.looked_at == len(told) == 1
    assert (told[0].done, told[0].total) == (1, 30)
    assert "30 pictures, 1 looked at" in next(lines(half))
    assert half.findings == ()


def test_large_pictures_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Each would need gigabytes."""
    folder = album(tmp_path, 12)
    inside, most = [], []
    read = pictures.load_image

    def slow(path):
        inside.append(path)
        most.append(len(inside))
        image = read(path)
        inside.remove(path)
        return image

    monkeypatch.setattr(pictures, "load_image", slow)
    monkeypatch.setattr(pictures, "LARGE_PIXELS", 100)
    assert len(list(pictures.look(tuple(sorted(folder.glob("*.png"))), 8))) == 12
    assert max(most) == 1


def test_little_is_kept_of_a_picture(tmp_path):
    scene(1, (2000, 1500)).save(tmp_path / "a.png")
    (picture,) = pictures.look((tmp_path / "a.png",), 1)
    kept = [value for value in vars(picture.measures).values() if isinstance(value, np.ndarray)]
    assert sum(value.nbytes for value in kept) < 12_000
    # No view of something larger.
    assert all(value.base is None or len(memoryview(value.base).tobytes()) < 12_000 for value in kept)


def test_the_command_line(tmp_path, capsys):
    folder = album(tmp_path / "d", 50)
    command = ["check", str(folder), "--resolution", "128"]
    assert main(command) == 0
    assert "nothing to mend" in capsys.readouterr().out
    caption(folder, p3="nice photo")
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {
        *("folder", "resolution", "pictures", "looked_at", "usable", "errors", "warnings", "advice", "findings"),
    }
    assert told["findings"][0] == {
        "kind": "caption-generic",
        "level": "warning",
        "files": ["p3.png"],
        "reason": '"nice photo" could be any picture',
        "mend": told["findings"][0]["mend"],
    }
    (folder / "p3.png").write_bytes(b"")
    assert main(command) == 2
    assert "  p3.png: is empty\n" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "missing")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sheet.png", "sheet.jpg"])
def test_the_sheet(tmp_path, capsys, name):
    folder = album(tmp_path / "d", 10)
    (folder / "p3.png").write_bytes(b"")
    assert main(["check", str(folder), "--resolution", "128", "--sheet", str(tmp_path / name)]) == 2
    sheet = Image.open(tmp_path / name)
    assert sheet.size == (8 * 136 + 8, 2 * (136 + 36) + 8)
    red, green, blue = sheet.convert("RGB").getpixel((9, 9))
    assert red > 150
    assert max(green, blue) < 80
    assert main(["check", str(folder), "--sheet", str(tmp_path / "sheet.gif")]) == 2
    assert "expected a name that ends in .png or .jpg" in capsys.readouterr().err


def test_every_kind_has_a_heading():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(pictures.__file__).parent.glob("check_*.py"))
    assert [kind for kind in KINDS if f'Finding("{kind}"' not in source] == []


def test_what_is_transparent_is_the_mask_where_masks_count(tmp_path):
    path = sorted(album(tmp_path, 12).glob("*.png"))[0]
    glass = Image.open(path).convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize(glass.size))
    glass.save(path)
    assert [finding.files for finding in found(tmp_path)["transparent"]] == [(path,)]
    assert "transparent" not in found(tmp_path, masked=True)
    told = ["check", str(tmp_path), "--resolution", "128", "--masked-loss"]
    with patch("lora_trainer.doctor.command.examine", wraps=examine) as asked:
        main(told)
    assert asked.call_args.kwargs["wanted"].masked
