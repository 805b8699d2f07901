"""Pictures: orientations, color profiles, misleading names, and what a host has done to Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

from lora_trainer.dataset import images
from lora_trainer.dataset.images import ImageError, image_facts, image_size, load_image

NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 255, (48, 32, 3), np.uint8))


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    NOISE.save(path, exif=exif(orientation), **({"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}))
    stored = NOISE.copy()
    stored.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(stored)
    found = load_image(path)
    assert found.size == image_size(path) == expected.size
    assert difference(found, expected) <= (12 if suffix == ".jpg" else 0)


def test_compressed_tiff_is_turned_once(tmp_path):
    path = tmp_path / "a.tif"
    NOISE.save(path, exif=exif(6), compression="tiff_lzw")
    assert load_image(path).size == image_size(path) == (48, 32)
    assert difference(load_image(path), NOISE.transpose(Image.Transpose.ROTATE_270)) == 0


def test_nonsense_in_exif_is_no_orientation(tmp_path):
    path = tmp_path / "a.jpg"
    for bad in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\xff\xff"):
        NOISE.save(path, exif=bad)
        assert load_image(path).size == image_size(path) == NOISE.size


def test_the_header_alone_gives_the_size(tmp_path):
    for suffix in (".png", ".jpg", ".bmp", ".tif"):
        path = tmp_path / f"a{suffix}"
        NOISE.resize((640, 480)).save(path)
        path.write_bytes(path.read_bytes()[: 12_000 if suffix != ".tif" else None])
        assert image_size(path) == (640, 480)


def test_the_suffix_may_lie(tmp_path):
    path = tmp_path / "really a png.jpg"
    NOISE.save(path, format="PNG")
    assert difference(load_image(path), NOISE) == 0


@pytest.mark.parametrize("name", ["红苹果", "りんご", "🍎 apple", "naïve é", "a" * 200])
def test_names_of_any_script(tmp_path, name):
    path = tmp_path / f"{name}.png"
    NOISE.save(path)
    assert load_image(path).size == image_size(path) == NOISE.size
    path.write_bytes(b"\x89PNG")
    with pytest.raises(ImageError, match=name):
        load_image(path)


def test_truncated_is_truncated_even_where_a_host_allows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for suffix in (".jpg", ".png"):
        path = tmp_path / f"a{suffix}"
        NOISE.save(path)
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(ImageError, match="cannot be decoded"):
            load_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_threads_that_read_at_once_leave_the_hosts_choice_as_it_was(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    first, second = images._TRUNCATION, images._TRUNCATION
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    second.__exit__(None, None, None)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_what_a_header_tells(tmp_path):
    path = tmp_path / "really a jpeg.png"
    NOISE.save(path, format="JPEG", exif=exif(6))
    found = image_facts(path)
    assert (found.format, found.size, found.animated, found.transparent) == ("JPEG", (48, 32), False, False)
    assert 20 < found.exif < 200
    frames = [Image.new("RGBA", (8, 8), color) for color in ("red", "#0000ff80")]
    frames[1].save(tmp_path / "a.png")
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert image_facts(tmp_path / "a.png").transparent
    assert image_facts(tmp_path / "a.gif").animated
    NOISE.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[NOISE])
    phone = image_facts(tmp_path / "phone.jpg")
    assert (phone.format, phone.animated) == ("JPEG", False)


def test_an_animated_webp_gives_its_first_frame(tmp_path):
    path = tmp_path / "a.webp"
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(path).getpixel((4, 4)) == (255, 0, 0)


def test_a_profile_is_turned_to_srgb(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / "a.png"
    NOISE.save(path, icc_profile=lab)
    assert difference(load_image(path), NOISE) == 0

    swapped = rgb_profile_with_red_and_blue_swapped(lab)
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path, icc_profile=swapped)
    assert difference(load_image(path).crop((0, 0, 1, 1)), Image.new("RGB", (1, 1), (0, 0, 255))) <= 2


def rgb_profile_with_red_and_blue_swapped(profile):
    """The tag table of an ICC profile names its parts: exchange the names of two, and drop "sRGB" from the text."""
    swapped = bytearray(profile)
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    plain = bytes(swapped).replace(b"s\0R\0G\0B", b"x\0R\0G\0B").replace(b"sRGB", b"xRGB")
    ImageCms.ImageCmsProfile(io.BytesIO(plain))
    return plain


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_broken_or_wrong_profile_is_ignored(tmp_path, mode):
    path = tmp_path / "a.tif"
    image = NOISE.convert(mode)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wrong = srgb.replace(b"s\0R\0G\0B", b"x\0R\0G\0B") if mode != "RGB" else b"not a profile"
    image.save(path, icc_profile=wrong)
    assert difference(load_image(path), image.convert("RGB")) == 0


def test_what_comes_back_is_only_pixels(tmp_path):
    path = tmp_path / "a.jpg"
    NOISE.save(path, exif=exif(6), comment=b"x")
    image = load_image(path)
    path.unlink()
    assert image.info == {}
    assert image.convert("L").size == (48, 32)
    assert type(image) is Image.Image
