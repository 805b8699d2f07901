"""Stable Diffusion 3 as it is lent by a stand-in for the WebUI: what its wrappers of text encoders say goes through."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_trainer.config import build
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.models.bridge import mmdit_view
from tests.tiny_sd3 import FIRST, SECOND, WIDTHS, tiny_sd3_state

WIDTH = sum(WIDTHS.values())
START, STOP = 49406, 49407


class Clips:
    """As Sd3ClipLG answers: filled up with zeros to T5's width, with a vector beside; words are numbers of letters."""

    id_start, id_end, width = START, STOP, WIDTH

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[len(word) for word in text.split()] for text in texts]

    def process_tokens(self, tokens: list[list[int]], multipliers: list[list[float]]) -> Tensor:
        given = torch.tensor(tokens).float().unsqueeze(-1) * torch.tensor(multipliers).unsqueeze(-1)
        said = F.pad(torch.sin(given * torch.arange(1, self.width + 1)), (0, 4096 - self.width))
        said.pooled = said[:, 0, : self.width]
        return said

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokenize([text.replace("(", "").replace(")", "") for text in texts])[0]
        chunk = [START, *ids, *[STOP] * (76 - len(ids))]
        said = self.process_tokens([chunk], [[1.1 if "(" in texts[0] else 1.0] * 77])
        return said, said.pooled

    def tokenize_line(self, line: str) -> tuple[list, int]:
        ids = self.tokenize([line])[0]
        tokens = [START, *ids, *[STOP] * (76 - len(ids))]
        return [SimpleNamespace(tokens=tokens, multipliers=[1.0] * 77, fixes=[])], len(ids)


class T5:
    """As Sd3T5."""

    id_end, id_pad = 1, 0

    def __init__(self, loaded: bool) -> None:
        self.t5xxl = self.say if loaded else None

    @staticmethod
    def say(ids: list[list[int]]) -> tuple[Tensor, None]:
        return torch.tensor(ids).float().unsqueeze(-1).expand(-1, -1, 4096), None

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[100 + len(word) for word in text.split()] for text in texts]

    def __call__(self, texts: list[str], *, token_count: int) -> Tensor:
        return torch.full((len(texts), token_count, 4096), 7.0)


@pytest.fixture
def lend(fake_webui, tmp_path):
    """view_of for settings, of a model whose T5 is loaded and on or not."""
    state = tiny_sd3_state()

    def part(prefix: str) -> SimpleNamespace:
        found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        return SimpleNamespace(state_dict=lambda: found)

    def lent(*, loaded: bool = False, on: bool = False, **settings: object):
        fake_webui("shared").opts.sd3_enable_t5 = on
        texts = {"clip_l": part("text_encoders.clip_l."), "clip_g": part("text_encoders.clip_g.")}
        network = mmdit_view(state)
        sd_model = SimpleNamespace(
            is_sd3=True,
            model=SimpleNamespace(diffusion_model=network, model_sampling=SimpleNamespace(shift=3)),
            first_stage_model=part("first_stage_model."),
            text_encoders=SimpleNamespace(**texts, model_lg=Clips(), model_t5=T5(loaded)),
            sd_checkpoint_info=SimpleNamespace(filename=str(tmp_path / "sd3.safetensors"), hash="1", sha256="2"),
        )
        config = build({"base_model": "sd3", "train_data_dir": "x"}, settings)
        return fake_webui.host("view").view_of(sd_model, config), state

    return lent


def test_all_is_shared_and_the_schedule_is_the_webuis(lend):
    model, state = lend()
    mine = [p for part in (model.unet, model.vae, *model.text.modules) for p in part.parameters()]
    left = {f"{FIRST}text_projection.weight"}
    assert {p.data_ptr() for p in mine} == {t.data_ptr() for name, t in state.items() if name not in left}
    assert model.noise.prediction == "flow"
    assert model.noise.sigmas[499] == pytest.approx(3 * 0.5 / 2)
    assert (model.vae.config.scaling_factor, model.vae.config.shift_factor) == (1.5305, 0.0609)


@pytest.mark.parametrize("syntax", ["literal", "webui"])
def test_clip_alone_comes_without_the_zeros(lend, syntax):
    model, _ = lend(caption_syntax=syntax, loaded=True)
    said, theirs = model.text.read("a (fat) cat"), Clips()
    words = "a (fat) cat" if syntax == "literal" else "a fat cat"
    ids = theirs.tokenize([words])[0]
    expected = theirs.process_tokens(
        [[START, *ids, *[STOP] * (76 - len(ids))]], [[1.0 if syntax == "literal" else 1.1] * 77]
    )
    assert torch.equal(said.context, expected[..., :WIDTH])
    assert torch.equal(said.pooled, expected.pooled)
    assert "T5-XXL stays silent" in " ".join(model.facts.notices)


def test_t5_is_heard_beside_them(lend):
    literal, _ = lend(loaded=True, on=True, caption_syntax="literal")
    prompts, _ = lend(loaded=True, on=True, caption_syntax="webui")
    for model in (literal, prompts):
        said = model.text.read("a cat")
        assert said.context.shape == (1, 2 * 77, 4096)
        assert "T5-XXL, which is on" in " ".join(model.facts.notices)
        with pytest.raises(DataError, match="Enable T5: expected the WebUI's setting off"):
            model.text.tokens("a cat")
        with pytest.raises(DataError, match="Enable T5"):
            model.text.conditions(model.text.tokenize("a cat"))
    ids = literal.text.read("a cat").context[0, 77:, 0].tolist()
    assert ids == [101, 103, 1] + [0] * 74
    assert prompts.text.read("a cat").context[0, 77:].eq(7).all()
    # Encoded captions are kept apart by it.
    silent, _ = lend(caption_syntax="literal")
    assert literal.text.hearing != silent.text.hearing


@pytest.mark.parametrize(("loaded", "on"), [(True, False), (False, True), (False, False)])
def test_t5_is_silent_unless_it_is_loaded_and_on(lend, loaded, on):
    model, _ = lend(loaded=loaded, on=on)
    assert model.text.read("a cat").context.shape == (1, 77, WIDTH)


def test_emphasis_in_the_step_restores_the_mean_of_both_clips_together(lend):
    model, _ = lend(caption_syntax="webui")
    parts = [torch.rand(2, 77, width, generator=torch.Generator().manual_seed(width)) for width in WIDTHS.values()]
    weights = torch.linspace(0.5, 1.5, 2 * 77).view(2, 77)
    whole = torch.cat(parts, dim=-1)
    weighed = whole * weights.unsqueeze(-1)
    expected = weighed * (whole.mean(dim=(1, 2), keepdim=True) / weighed.mean(dim=(1, 2), keepdim=True))
    torch.testing.assert_close(model.text.joined(parts, weights), expected)
    assert torch.equal(model.text.joined(parts, None), whole)


def test_clip_skip_is_refused(lend):
    with pytest.raises(ConfigError, match="clip_skip: Stable Diffusion 3"):
        lend(clip_skip=1)


def test_the_encoders_are_the_two_of_the_file(lend):
    model, _ = lend()
    assert [encoder.module.config.hidden_size for encoder in model.text.encoders] == [WIDTHS[FIRST], WIDTHS[SECOND]]
    assert [encoder.module.config.hidden_act for encoder in model.text.encoders] == ["quick_gelu", "gelu"]
