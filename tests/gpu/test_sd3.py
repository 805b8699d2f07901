"""On a CUDA device: a step of Stable Diffusion 3 is captured, and learns what an eager one does."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.config import build
from lora_trainer.hosts.standalone import open_model
from lora_trainer.sampling import Recipe, denoise
from lora_trainer.training.precision import Precision
from lora_trainer.training.segment import open_segment
from lora_trainer.training.settings import torch_settings
from lora_trainer.training.step import Batch
from tests.tiny_sd3 import WIDTHS, tiny_sd3_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd3_checkpoint(tmp_path_factory.mktemp("sd3"))


def batch(number: int) -> Batch:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(number))

    width = sum(WIDTHS.values())
    return Batch(
        latents=drawn(2, 16, 8, 12),
        eps=drawn(2, 16, 8, 12).flip(0),
        t=torch.tensor([number * 37 % 1000, number * 91 % 1000]),
        weight=torch.full((2,), 0.5),
        mask_keys=torch.full((2, 2), number, dtype=torch.int32),
        context=drawn(2, 77, width),
        pooled=drawn(2, width),
        sizes=torch.zeros(2, 6),
    ).pinned()


def learned(base, precision: str, *, captured: bool, checkpointing: bool = False) -> tuple[torch.Tensor, int]:
    """The products after 20 steps, and how many graphs there were."""
    settings = {"mixed_precision": precision, "gradient_checkpointing": checkpointing, "lora_dropout": 0.1}
    config = build({"base_model": str(base), "train_data_dir": "x"}, settings)
    model = open_model(base, CUDA, DTYPES.get(precision, torch.float32))
    with torch_settings(None), open_segment(config, model, None) as segment:
        segment.captures.enabled &= captured
        for number in range(20):
            segment.trainables.set_learning_rate(1e-3)
            segment.forward_backward(batch(number))
            segment.update()
        factors = [f for adapter in segment.adapters.values() for f in adapter.factors().values()]
        return torch.cat([(f.up @ f.down).flatten() for f in factors]), segment.captures.count


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_captured_steps_learn_what_eager_ones_do(base, precision, checkpointing):
    got, graphs = learned(base, precision, captured=True, checkpointing=checkpointing)
    eager, none = learned(base, precision, captured=False, checkpointing=checkpointing)
    exact, _ = learned(base, "no", captured=False)
    print(
        f"{precision}: captured {apart(got, eager):.2e}, from fp32 {apart(got, exact):.2e}, {apart(eager, exact):.2e}"
    )
    assert (graphs, none) == (2, 0)
    assert apart(got, exact) <= 1.5 * apart(eager, exact)


@pytest.mark.parametrize("precision", DTYPES)
def test_half_precision_draws_nearly_the_same(base, precision):
    recipe = Recipe((64, 96), steps=4, seed=1)
    exact = denoise(open_model(base, CUDA), "a cat", recipe, Precision(CUDA, torch.float32))
    half = denoise(open_model(base, CUDA, DTYPES[precision]), "a cat", recipe, Precision(CUDA, DTYPES[precision]))
    print(f"{precision}: {apart(half, exact):.2e}")
    assert apart(half, exact) < 0.05
