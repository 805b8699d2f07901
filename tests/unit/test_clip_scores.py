"""CLIP scores of drawn pictures: by a tiny random CLIP model in a folder; what is told, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from lora_trainer.config import build
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.events import Compared
from lora_trainer.hosts.standalone import train as train_here
from lora_trainer.jobs.fold import Told, fold
from lora_trainer.jobs.store import Head, first_view
from lora_trainer.models import latents
from lora_trainer.training.clip_scores import Clip
from lora_trainer.training.fidelity import CLIP_PASSES, PROMPTS, STEPS, Fidelity
from lora_trainer.training.judging import SHARE
from lora_trainer.ui.judgement import comparison
from tests.unit.test_fidelity import OFTEN, often  # noqa: F401
from tests.unit.test_run import of, train

CPU = torch.device("cpu")
VOCABULARY = Path(latents.__file__).parent / "clip"
START, END = 49406, 49407


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIPModel with random weights, as transformers saves one; the vocabulary is the real one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    text = {**small, **ids, "vocab_size": 49408, "max_position_embeddings": 77}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder, safe_serialization=True)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(VOCABULARY, local_files_only=True).save_pretrained(folder)
    return folder


def picture(seed: int, size=(48, 40)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def test_the_scores_are_mean_cosines_of_the_models_own_embeddings(clip_folder):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    real, drawn = [picture(n) for n in range(11)], [picture(50), picture(51, (32, 64))]
    prompts = ["a red castle", "a dog " * 200]
    clip = Clip(clip_folder)
    clip.remember(iter(real), CPU)
    scores = clip(drawn, prompts, CPU)

    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor, tokenizer = (kind.from_pretrained(clip_folder) for kind in (CLIPImageProcessor, CLIPTokenizer))

    def embedded(image: Image.Image, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        words = tokenizer([text], return_tensors="pt", truncation=True, max_length=77)
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = model(**words, pixel_values=pixels)
        return out.image_embeds[0], out.text_embeds[0]

    cosine = torch.nn.functional.cosine_similarity
    seen = [embedded(image, "")[0] for image in real]
    both = [embedded(image, text) for image, text in zip(drawn, prompts, strict=True)]
    image = np.mean([cosine(one, other, dim=0).item() for one, _ in both for other in seen])
    text = np.mean([cosine(one, said, dim=0).item() for one, said in both])
    assert scores == (pytest.approx(image, abs=1e-5), pytest.approx(text, abs=1e-5))
    # A picture among the training pictures is more like them than another one.
    assert clip([real[0]], [""], CPU).image != scores.image
    clip.remember([real[0]], CPU)
    assert clip([real[0]], [""], CPU).image == pytest.approx(1, abs=1e-5)


def test_a_run_tells_them_from_the_base_on_and_learns_the_same(settings, often, clip_folder, tmp_path):  # noqa: F811
    events: list = []
    given = OFTEN | {"clip_model_dir": str(clip_folder), "learning_rate": 2e-2}
    train_here(build(settings, given), events.append)
    told = of(events, Compared)
    assert [event.step for event in told] == [0, 4, 8]
    assert all(-1 <= score <= 1 for event in told for score in (event.clip_image, event.clip_text))
    assert len({event.clip_image for event in told}) == len({event.clip_text for event in told}) == 3

    with (tmp_path / "out" / "logs" / "drift.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["clip_text"]) for row in rows] == [event.clip_text for event in told]
    view = first_view(Head("a", "style", 1.0, {}))
    for event in events:
        view = fold(view, Told(1.0, event))
    html = comparison(view)
    assert "CLIP: like the prompts" in html
    assert f"CLIP without the LoRA: {told[0].clip_image:.3f} and {told[0].clip_text:.3f}" in html
    assert f"<td>{told[2].clip_image:.3f}</td><td>{told[2].clip_text:.3f}</td>" in html
    assert any(f"CLIP {told[1].clip_image:.3f} to training pictures" in line for line in view.log)

    lora = (tmp_path / "out" / "tiny.safetensors").read_bytes()
    without, plain = train(settings, **given | {"clip_model_dir": None, "overwrite": True})
    assert [(e.step, e.likeness, e.drift) for e in of(without, Compared)] == [
        (e.step, e.likeness, e.drift) for e in told
    ]
    from safetensors.torch import load

    one, other = load(lora), load(plain)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "CLIP" not in comparison(fold(first_view(Head("a", "b", 1.0, {})), Told(1.0, of(without, Compared)[-1])))


def test_their_cost_counts(settings, clip_folder):
    plain, scored = (
        Fidelity(build(settings, {"measure_drift": True, "batch_size": 4, **more}), print)
        for more in ({}, {"clip_model_dir": str(clip_folder)})
    )
    for measure in (plain, scored):
        measure._asked, measure._real = ["a caption"] * 8, [None] * 24
    assert scored.passes == plain.passes + 8 * CLIP_PASSES == len(PROMPTS) * STEPS + 8 * (STEPS + 1 + CLIP_PASSES)
    every = scored.every(5000, 10)
    assert every > plain.every(5000, 10)
    assert (2 + (5000 - 1) // every) * scored.passes + 2 * 24 <= SHARE * 5000 * 4 * 3


def config_of(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def test_a_folder_without_a_clip_model_is_refused_before_anything_is_encoded(settings, clip_folder, tmp_path):
    def refused(folder: Path) -> str:
        with pytest.raises(ModelError) as error:
            train(settings, measure_drift=True, clip_model_dir=str(folder))
        return str(error.value)

    assert "clip_model_dir: " in refused(tmp_path / "missing")
    assert "expected that of a CLIP model of transformers, found none" in refused(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(clip_folder, other)
    config_of(other, model_type="siglip")
    assert "expected model_type clip, found siglip" in refused(other)
    config_of(other, model_type="clip")
    for file in other.glob("*.safetensors"):
        file.unlink()
    assert "expected weights as .safetensors, found none" in refused(other)
    with pytest.raises(ConfigError, match="clip_model_dir: expected measure_drift beside it"):
        build(settings, {"clip_model_dir": str(clip_folder)})


def test_damaged_weights_are_refused_and_never_made_up(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(clip_folder, other)
    (weights,) = other.glob("*.safetensors")
    tensors = load_file(weights)
    del tensors["visual_projection.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"clip_model_dir: .* 1 are missing, for example visual_projection"):
        Clip(other).remember([picture(0)], CPU)
    weights.write_bytes(b"torn")
    with pytest.raises(ModelError, match="not a CLIP model that transformers loads"):
        Clip(other).remember([picture(0)], CPU)


def test_pictures_that_a_half_precision_vae_cannot_decode_are_decoded_in_float32(monkeypatch):
    class Vae(torch.nn.Module):
        """Overflows in half precision."""

        config = FrozenDict(scaling_factor=1.0)

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(60000.0, dtype=torch.float16))

        def decode(self, x: torch.Tensor):
            return type("Decoded", (), {"sample": x * self.scale * 2 / 120000})

    assert latents.decode(Vae(), torch.ones(1, 1)).item() == pytest.approx(1, rel=1e-3)
    assert Vae().decode(torch.ones(1, 1, dtype=torch.float16)).sample.isinf().all()
