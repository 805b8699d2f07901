"""The fused blocks against diffusers' and PEFT's own forwards, and what a run gives up when memory runs out."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock

from lora_trainer.config import build
from lora_trainer.events import Notice, StepDone
from lora_trainer.models.single_file import model_of, place
from lora_trainer.training import segment as segments
from lora_trainer.training.capture import Captures, out_of_memory
from lora_trainer.training.checkpointing import BLOCKS, checkpointed
from lora_trainer.training.fused import fuse
from lora_trainer.training.ladder import NONE, Plan
from lora_trainer.training.planning import OutOfMemoryError
from lora_trainer.training.prefetch import ahead
from lora_trainer.training.step import Batch, ForwardBackward
from tests.unit.test_run import lora_of, of, train

CPU = torch.device("cpu")


def batch(size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        latents=torch.randn(size, 4, 8, 16, generator=generator),
        eps=torch.randn(size, 4, 8, 16, generator=generator),
        t=torch.tensor([10, 500, 990])[:size],
        context=torch.randn(size, 77, 16, generator=generator),
        weight=torch.full((size,), 1 / size),
        mask_keys=torch.randint(-(2**31), 2**31, (size, 2), generator=generator, dtype=torch.int32),
    )


def opened(checkpoint, **settings):
    """A segment on a fresh view, as a context manager."""
    family, state = place(checkpoint, CPU, torch.float32)
    model = model_of(state, family, checkpoint, device=CPU, hashes=lambda: None)
    config = build({"base_model": "tiny", "train_data_dir": "x", "mixed_precision": "no"}, settings)
    return segments.open_segment(config, model, None)


def one_step(segment):
    """(loss, gradients) of one batch, the LoRA having effect."""
    for slot in segment.trainables.slots:
        slot.of(segment.trainables.masters).normal_(std=0.1, generator=torch.Generator().manual_seed(slot.start))
    segment.forward_backward(batch())
    return segment.forward_backward.loss.clone(), segment.trainables.grads.clone()


@pytest.mark.parametrize("targets", [["default"], ["conv"], ["default", "conv"], ["to_q", "ff.net.2"]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_blocks_compute_what_diffusers_and_peft_do(checkpoint, monkeypatch, targets, dropout):
    with opened(checkpoint, target_modules=targets, lora_dropout=dropout) as fused:
        mine = one_step(fused)
        names = [type(m).__name__ for m in fused.model.unet.modules() if "forward" in m.__dict__]
        assert names.count("BasicTransformerBlock") == 4
        assert ("ResnetBlock2D" in names) == ("conv" not in targets)
    monkeypatch.setattr(segments, "fuse", lambda network, fused: nullcontext())
    with opened(checkpoint, target_modules=targets, lora_dropout=dropout) as plain:
        assert not [m for m in plain.model.unet.modules() if "forward" in m.__dict__]
        theirs = one_step(plain)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=0)
    assert (mine[1] - theirs[1]).norm() < 2e-6 * theirs[1].norm()


def test_the_view_is_diffusers_again_afterwards(checkpoint):
    with opened(checkpoint, gradient_checkpointing=True) as segment:
        unet = segment.model.unet
        assert any("forward" in module.__dict__ for module in unet.modules())
    assert not any("forward" in module.__dict__ for module in unet.modules())


def test_patches_nest(checkpoint):
    with opened(checkpoint) as segment:
        block = next(m for m in segment.model.unet.modules() if type(m).__name__ == "ResnetBlock2D")
        ours = block.forward
        with checkpointed(segment.model.unet):
            assert block.forward is not ours
        assert block.forward is ours


def test_switched_off_and_weighed_loras_are_heard(checkpoint):
    with opened(checkpoint, lora_dropout=0.0) as segment:
        one_step(segment)
        losses = []
        for weight in (0, 0.5, 1):
            with segment.adapters["unet"].weight(weight), torch.no_grad():
                losses.append(segment.network.losses(batch()))
        with fuse(segment.model.unet, Fusedless(segment)), segment.adapters["unet"].weight(0), torch.no_grad():
            base = segment.network.losses(batch())
        assert torch.equal(losses[0], base)
        assert not torch.equal(losses[1], losses[0])
        assert not torch.equal(losses[1], losses[2])


def Fusedless(segment):
    from lora_trainer.kernels.plain import PlainOps
    from lora_trainer.training.fused import Fused

    return Fused(PlainOps(), torch.float32, {})


def test_a_split_batch_is_the_same_batch():
    whole = batch()
    parts = whole.split(2)
    assert [part.latents.shape[0] for part in parts] == [2, 2]
    assert parts[1].weight.tolist() == pytest.approx([1 / 3, 0])
    assert torch.equal(torch.cat([part.mask_keys for part in parts])[:3], whole.mask_keys)
    assert whole.weight.tolist() == pytest.approx([1 / 3] * 3)


def test_the_ladder_ends():
    plan, seen = Plan(NONE), []
    while plan is not None:
        seen.append(str(plan))
        plan = plan.lighter(3)
    assert seen == [
        "no gradient checkpointing",
        "gradient checkpointing",
        "gradient checkpointing of all blocks",
        "gradient checkpointing of all blocks, batches in 2 parts",
        "gradient checkpointing of all blocks, batches in 3 parts",
    ]


def test_most_blocks_are_all_but_a_quarter_of_the_widest():
    unet = diffusers_unet()
    blocks = [m for m in unet.modules() if isinstance(m, BLOCKS)]
    widest = [m for m in blocks if isinstance(m, BasicTransformerBlock) and m.norm1.weight.numel() == 64]
    assert len(widest) == 4
    with checkpointed(unet, every=False) as count:
        left_alone = [block for block in blocks if "forward" not in block.__dict__]
    assert count == len(blocks) - 1
    assert left_alone == [widest[3]]
    with checkpointed(unet) as count:
        assert count == len(blocks)


def diffusers_unet():
    """With four transformer blocks of width 64 and three of 32."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
        )


@pytest.mark.parametrize("failures", [1, 3])
def test_out_of_memory_steps_down_and_loses_nothing(settings, monkeypatch, failures):
    expected_events, expected = train(settings)
    calls, original = [], ForwardBackward._compute

    def short_of_memory(self, given):
        calls.append(given.latents.shape[0])
        if len(calls) > 2 and len(calls) <= 2 + failures:
            raise torch.cuda.OutOfMemoryError("by the test")
        original(self, given)

    monkeypatch.setattr(ForwardBackward, "_compute", short_of_memory)
    events, got = train(settings)
    told = [notice.text for notice in of(events, Notice) if "out of memory" in notice.text]
    assert len(told) == failures
    assert told[0].startswith("step 3: out of memory, goes on with gradient checkpointing")
    assert [e.step for e in of(events, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert min(calls) == (2 if failures == 1 else 1)
    mine, theirs = lora_of(got, settings), lora_of(expected, settings)
    for name, factors in theirs.items():
        torch.testing.assert_close(mine[name].up, factors.up, rtol=1e-2, atol=2e-6)
    losses = [[e.loss for e in of(es, StepDone)] for es in (events, expected_events)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_out_of_memory_with_everything_given_up_ends_with_advice(settings, monkeypatch):
    def never(self, given):
        raise torch.cuda.OutOfMemoryError("by the test")

    monkeypatch.setattr(ForwardBackward, "_compute", never)
    with pytest.raises(OutOfMemoryError, match="step 1: out of GPU memory, also with .* 2 parts.*resolution"):
        train(settings)


def test_captures_run_parts_where_there_is_no_gpu():
    captures, ran = Captures(CPU), []
    for _ in range(3):
        captures.run("part", lambda: ran.append(1))
    assert (len(ran), captures.count, captures.reason) == (3, 0, None)
    captures.release()


def test_memory_errors_are_found_behind_others():
    try:
        try:
            raise torch.cuda.OutOfMemoryError("first")
        except RuntimeError:
            raise RuntimeError("while ending the capture") from None
    except RuntimeError as error:
        assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("other"))


def test_work_ahead_keeps_order_ends_and_raises():
    def items():
        yield from range(5)
        raise ValueError("by the test")

    for depth in (0, 2):
        seen = []
        with pytest.raises(ValueError, match="by the test"), ahead(items(), depth) as made:  # noqa: PT012
            for item in made:
                seen.append(item)
        assert seen == [0, 1, 2, 3, 4]
    with ahead(iter(int, 1), 2) as made:
        assert next(made) == 0
