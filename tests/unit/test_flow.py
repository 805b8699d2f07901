"""The rectified flow beside its formulas in float64, and Euler's method beside exact solutions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lora_trainer.config import build
from lora_trainer.models.flow import Euler, Flow, shifted
from lora_trainer.training.objectives import mse, objective_of

NEEDED = {"base_model": "x", "train_data_dir": "y"}


def flow(shift: float = 3.0) -> Flow:
    return Flow(shifted(shift))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_the_table_is_the_papers_shift():
    """Esser et al. 2024, eq. 23: the same signal-to-noise ratio at sqrt(m / n) = 3 times the size."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(flow().sigmas.double(), 3 * t / (1 + 2 * t), rtol=5e-7, atol=0)
    torch.testing.assert_close(flow(1.0).sigmas.double(), t, rtol=5e-7, atol=0)
    assert flow().sigmas[-1] == 1
    assert flow().timesteps == 1000


def test_noise_and_target_by_the_formulas():
    x0, noise, t = random(3, 16, 4, 4), random(3, 16, 4, 4).flip(0), torch.tensor([0, 400, 999])
    schedule, sigma = flow(), flow().sigmas.double()[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), (1 - sigma) * x0 + sigma * noise)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t)[2], noise[2])
    torch.testing.assert_close(schedule.target(x0, noise, t), noise - x0)
    torch.testing.assert_close(schedule.times(t).double(), 1000 * sigma.flatten())
    # The target is the derivative along the way, and leads from what is shown back to the picture.
    shown = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(shown - sigma * schedule.target(x0, noise, t), x0)
    snr = ((1 - sigma) / sigma).square().flatten()
    torch.testing.assert_close(schedule.snr[t], snr)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "l1"}, {"loss_type": "huber", "huber_schedule": "constant"}])
def test_the_loss_weighs_all_times_alike(settings):
    x0, noise, t = random(3, 16, 4, 4), random(3, 16, 4, 4).flip(0), torch.tensor([0, 400, 999])
    target = flow().target(x0, noise, t)
    predicted = random(3, 16, 4, 4).flip(1)
    error = predicted - target
    expected = {
        "l2": error.square(),
        "l1": error.abs(),
        "huber": 2 * 0.1 * ((error.square() + 0.1**2).sqrt() - 0.1),
    }[settings.get("loss_type", "l2")]
    objective = objective_of(build(NEEDED, settings), flow())
    assert objective.weights is None
    found = objective(predicted.float(), target.float(), t)
    torch.testing.assert_close(found.double(), expected.mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-6)
    if not settings:
        torch.testing.assert_close(found, mse(predicted.float(), target.float(), t))


def test_eulers_steps_lie_where_k_diffusion_puts_them():
    """external.py, DiscreteSchedule.get_sigmas and t_to_sigma, by interpolation of the logarithms."""
    solver, steps = Euler(flow()), 7
    solver.set_timesteps(steps)
    at = torch.linspace(999, 0, steps, dtype=torch.float64)
    logs = flow().sigmas.double().log()
    low = at.floor().long()
    expected = torch.lerp(logs[low], logs[at.ceil().long()], at - low).exp()
    torch.testing.assert_close(solver.timesteps.double(), 1000 * expected, rtol=1e-5, atol=0)
    assert solver.timesteps[0] == 1000


def test_a_straight_way_is_followed_exactly():
    picture, noise = random(1, 16, 4, 4).float(), random(1, 16, 4, 4).flip(1).float()
    solver, x = Euler(flow()), noise
    solver.set_timesteps(5)
    for t in solver.timesteps:
        (x,) = solver.step(noise - picture, t, x, return_dict=False)
    torch.testing.assert_close(x, picture, rtol=0, atol=1e-5)


def test_many_steps_find_gaussian_data():
    """Of pictures from N(μ, s²) the flow is known: its end has that mean and spread."""
    mean, spread = 2.0, 0.5
    x = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solver = Euler(flow())
    solver.set_timesteps(400)
    for t in solver.timesteps:
        sigma = t.item() / 1000
        variance = ((1 - sigma) * spread) ** 2 + sigma**2
        off = x - (1 - sigma) * mean
        noise, picture = sigma * off / variance, mean + (1 - sigma) * spread**2 * off / variance
        (x,) = solver.step(noise - picture, t, x)
    torch.testing.assert_close(x.mean().item(), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(x.std().item(), spread, rtol=0, atol=0.02)


def test_one_step_from_noise_is_the_networks_guess():
    guess, x = random(1, 16, 4, 4), random(1, 16, 4, 4).flip(2)
    solver = Euler(flow())
    solver.set_timesteps(1)
    (t,) = solver.timesteps
    (end,) = solver.step(x - guess, t, x)
    assert F.mse_loss(end, guess) < 1e-12
