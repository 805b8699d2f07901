"""Losses, weights, noise and timesteps against their published formulas, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from diffusers import DDIMScheduler

from lora_trainer.config import build
from lora_trainer.errors import ConfigError
from lora_trainer.events import StepDone, Validated
from lora_trainer.models.noise import NoiseSchedule, scaled_linear
from lora_trainer.training import objectives, randomness
from lora_trainer.training.described import objective_settings
from lora_trainer.training.noising import Noising, cubic, logit_normal, multires_noise, offset_noise
from lora_trainer.training.objectives import objective_of, training_noise
from tests.unit.test_run import of, train, weights

NEEDED = {"train_data_dir": "d", "base_model": "m"}
EPSILON = NoiseSchedule(scaled_linear(0.00085, 0.012, 1000), "epsilon")
V = replace(EPSILON, prediction="v")
A = EPSILON.alphas_cumprod.double()
SNR = A / (1 - A)
SIGMA = ((1 - A) / A).sqrt()
T = torch.arange(1000, dtype=torch.float64)


def config(**settings):
    return build(NEEDED, settings)


def close(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "epsilon", "v"),
    [
        ({"min_snr_gamma": 5}, torch.minimum(SNR, 5 + 0 * SNR) / SNR, torch.minimum(SNR, 5 + 0 * SNR) / (SNR + 1)),
        # k-diffusion's sampling of x0: SNR weight 1 / (sigma^2 + 1 / gamma), over that of the noise's error, the SNR.
        ({"soft_min_snr_gamma": 4}, 1 / (SIGMA**2 + 1 / 4) / SNR, 1 / (SIGMA**2 + 1 / 4) / (SNR + 1)),
        ({"debiased_estimation_loss": True}, 1 / SNR.sqrt(), SNR.sqrt() / (SNR + 1)),
    ],
)
def test_weights_are_the_papers(settings, epsilon, v):
    close(objective_of(config(**settings), EPSILON).weights, epsilon)
    close(objective_of(config(**settings), V).weights, v)


def test_a_v_loss_weighed_like_noise_is_the_loss_of_the_noise():
    torch.manual_seed(0)
    x0, eps, v = (torch.randn(5, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0, 10, 500, 900, 999])
    schedule = NoiseSchedule(A, "v")
    a = A[t].view(-1, 1, 1, 1)
    noise = a.sqrt() * v + (1 - a).sqrt() * schedule.add_noise(x0, eps, t)
    objective = objective_of(config(scale_v_pred_loss_like_noise_pred=True), schedule)
    got = objective.loss(v, schedule.target(x0, eps, t), None).mean(dim=(1, 2, 3)) * objective.weights[t]
    torch.testing.assert_close(got, (noise - eps).square().mean(dim=(1, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", 0.2 + 0 * T),
        ("exponential", torch.exp(-(-math.log(0.2) / 1000) * T)),
        ("snr", (1 - 0.2) / (1 + SIGMA) ** 2 + 0.2),
    ],
)
def test_hubers_c_follows_its_schedule(schedule, expected):
    close(objective_of(config(loss_type="huber", huber_schedule=schedule, huber_c=0.2), EPSILON).c, expected)


def test_losses_are_their_formulas():
    torch.manual_seed(1)
    p, q = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    c, e = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64).view(-1, 1, 1, 1), p - q
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(objectives.l2(p, q, None), e**2, **exact)
    torch.testing.assert_close(objectives.l1(p, q, None), e.abs(), **exact)
    torch.testing.assert_close(objectives.huber(p, q, c), 2 * c * (torch.sqrt(e**2 + c**2) - c), **exact)
    torch.testing.assert_close(objectives.smooth_l1(p, q, c), 2 * (torch.sqrt(e**2 + c**2) - c), **exact)
    large = torch.full_like(e, 1e6)
    torch.testing.assert_close(objectives.smooth_l1(large, 0 * large, c), 2 * large, rtol=1e-5, atol=0)


def test_an_objective_looks_its_tables_up_by_timestep():
    torch.manual_seed(2)
    p, q, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([3, 500, 990])
    objective = objective_of(config(loss_type="huber", min_snr_gamma=1), EPSILON)
    c = ((1 - 0.1) / (1 + SIGMA[t]) ** 2 + 0.1).view(-1, 1, 1, 1)
    e = (p - q).double()
    expected = (2 * c * ((e**2 + c**2).sqrt() - c)).mean(dim=(1, 2, 3)) * torch.minimum(1 / SNR[t], 1 + 0 * SNR[t])
    torch.testing.assert_close(objective(p, q, t).double(), expected, rtol=1e-5, atol=1e-7)


def test_zero_terminal_snr_is_diffusers_and_its_weights_are_finite():
    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ).alphas_cumprod
    mine = training_noise(config(zero_terminal_snr=True), V)
    torch.testing.assert_close(mine.alphas_cumprod[:-1], theirs[:-1], rtol=2e-4, atol=2e-6)
    assert mine.alphas_cumprod[-1] == 0
    assert mine.alphas_cumprod[0] == pytest.approx(EPSILON.alphas_cumprod[0].item(), rel=1e-6)
    for settings in ({"min_snr_gamma": 5}, {"soft_min_snr_gamma": 4}, {"debiased_estimation_loss": True}):
        last = objective_of(config(**settings), mine).weights
        assert torch.isfinite(last).all()
        assert last[-1] < 1e-4
    assert torch.isfinite(objective_of(config(loss_type="huber"), mine).c).all()


@pytest.mark.parametrize("key", ["zero_terminal_snr", "scale_v_pred_loss_like_noise_pred"])
def test_what_needs_v_says_so(key):
    with pytest.raises(ConfigError, match=f"{key}: expected a v-prediction model, found one that predicts epsilon"):
        objective_of(config(**{key: True}), training_noise(config(**{key: True}), EPSILON))


@pytest.mark.parametrize(
    ("settings", "cumulative"),
    [
        ({}, lambda x: x),
        ({"min_timestep": 200, "max_timestep": 700}, lambda x: min(max((x - 0.2) / 0.5, 0), 1)),
        (
            {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8},
            lambda x: NormalDist(0.5, 0.8).cdf(math.log(x / (1 - x))),
        ),
        ({"timestep_sampling": "cubic"}, lambda x: 1 - (1 - x) ** (1 / 3)),
        (
            {"timestep_sampling": "cubic", "min_timestep": 500},
            lambda x: 1 - (1 - max(2 * x - 1, 0)) ** (1 / 3),
        ),
    ],
)
def test_timesteps_follow_their_law(settings, cumulative):
    t = Noising.of(config(**settings), EPSILON).timesteps(0, range(20_000), 1000)
    assert t.min() >= settings.get("min_timestep", 0)
    assert t.max() < settings.get("max_timestep", 1000)
    for x in (0.05, 0.25, 0.5, 0.65, 0.9, 0.99):
        assert (t < 1000 * x).double().mean().item() == pytest.approx(cumulative(x), abs=0.013)


def test_a_model_that_knows_few_timesteps_is_trained_on_those():
    known = replace(EPSILON, limit=200)

    def span(**settings: int) -> tuple[int, int]:
        made = Noising.of(config(**settings), known)
        return made.low, made.high

    assert span() == (0, 200)
    assert Noising.of(config(), known).timesteps(0, range(2000), 1000).max() == 199
    assert span(max_timestep=1000) == (0, 1000)
    assert span(min_timestep=50, max_timestep=150) == (50, 150)
    assert known.to(torch.device("cpu")).zero_terminal().trained == 200
    with pytest.raises(ConfigError, match="min_timestep: expected less than 200, .* found 300"):
        span(min_timestep=300)


def test_laws_are_their_formulas():
    for u in (1e-9, 0.1, 0.5, 0.9, 1 - 1e-9):
        z = NormalDist().inv_cdf(u)
        assert logit_normal(u, 0.3, 1.5) == pytest.approx(torch.tensor(0.3 + 1.5 * z).double().sigmoid().item(), 1e-6)
        assert cubic(u) == 1 - u**3
    t = Noising(quantile=lambda u: 1.0).timesteps(0, [1], 1000)
    assert t.tolist() == [999]


def test_offset_noise_is_one_number_a_channel():
    latents = torch.randn(2, 4, 8, 8) + torch.tensor([3.0, -2.0, 0.0, 1.0]).view(1, 4, 1, 1)
    plain = Noising().noise(7, [4, 9], latents)
    offset = Noising(offset=0.1).noise(7, [4, 9], latents) - plain
    numbers = randomness.normal(7, "noise offset", [4, 9], (4, 1, 1))
    torch.testing.assert_close(offset, (0.1 * numbers).expand_as(offset))
    adaptive = offset_noise(7, [4, 9], latents, strength=0.1, adaptive=0.5)
    torch.testing.assert_close(adaptive, (0.1 + 0.5 * latents.mean((2, 3), keepdim=True).abs()) * numbers)
    assert not offset_noise(7, [4, 9], latents, strength=0.1, adaptive=-10)[:, 0].any()


def test_multires_noise_is_kohyas_pyramid():
    eps = torch.randn(4, 16, 24)
    expected, ratios = eps.clone(), []
    for i in range(6):
        r = 2 + 2 * randomness.uniform(3, f"multires ratio {i}", 5)
        ratios.append(r)
        h, w = max(1, int(16 / r**i)), max(1, int(24 / r**i))
        noise = randomness.normal(3, f"multires noise {i}", [5], (4, h, w))
        expected += torch.nn.Upsample((16, 24), mode="bilinear")(noise)[0] * 0.4**i
        if h == 1 or w == 1:
            break
    assert all(2 < ratio < 4 for ratio in ratios)
    got = multires_noise(3, 5, eps, iterations=6, discount=0.4)
    torch.testing.assert_close(got, expected / expected.std())
    many = Noising(iterations=6, discount=0.4).noise(3, range(200), torch.zeros(200, 4, 16, 24))
    assert many.square().mean().item() == pytest.approx(1, abs=0.02)


def test_draws_are_of_the_visit_alone():
    noising = Noising(quantile=cubic, offset=0.1, adaptive=0.2, iterations=4, perturbation=0.1)
    latents = torch.randn(3, 4, 8, 8)
    whole = noising.noise(1, [5, 6, 7], latents)
    alone = noising.noise(1, [6], latents[1:2])
    assert torch.equal(whole[1:2], alone)
    assert torch.equal(noising.input_noise(1, [5, 6, 7], whole)[1:2], noising.input_noise(1, [6], alone))
    assert noising.timesteps(1, [5, 6, 7], 1000)[1] == noising.timesteps(1, [6], 1000)[0]


def test_input_perturbation_is_shown_and_not_asked_for():
    eps = torch.zeros(64, 4, 8, 8)
    shown = Noising(perturbation=0.1).input_noise(0, range(64), eps)
    assert shown.std().item() == pytest.approx(0.1, rel=0.03)
    assert Noising().input_noise(0, [1], eps[:1]) is None


ALL = {
    "loss_type": "smooth_l1",
    "min_snr_gamma": 5,
    "noise_offset": 0.05,
    "adaptive_noise_scale": 0.1,
    "multires_noise_iterations": 6,
    "ip_noise_gamma": 0.1,
    "timestep_sampling": "logit_normal",
    "min_timestep": 100,
    "max_timestep": 900,
}


def test_a_run_with_everything_is_cut_and_resumed_like_any_other(settings):
    """The same update however it is cut, and the held-out loss of the base is that of a plain run."""
    seen = []
    for size, accumulation in ((6, 1), (2, 3)):
        events, _ = train(
            settings, batch_size=size, gradient_accumulation_steps=accumulation, resolution=64, epochs=1, **ALL
        )
        (step,) = of(events, StepDone)
        seen.append(step)
    assert seen[0].loss == pytest.approx(seen[1].loss, abs=1e-5)
    assert seen[0].grad_norm == pytest.approx(seen[1].grad_norm, rel=1e-4)
    held_out = {"validation_split": 0.4, "epochs": 1}
    plain, changed = (train(settings, **held_out, **more) for more in ({}, ALL))
    assert of(plain[0], Validated)[0].base == of(changed[0], Validated)[0].base
    assert weights(plain[1]) != weights(changed[1])


LOSS, NOISE = ({key: ALL[key] for key in keys} for keys in (list(ALL)[:2], list(ALL)[2:]))


@pytest.mark.parametrize("key", ALL)
def test_each_setting_changes_the_loss_or_the_draws(key):
    beside = {"noise_offset": 0.05} if key == "adaptive_noise_scale" else {}
    plain, changed = config(**beside), config(**beside | {key: ALL[key]})
    if key in LOSS:
        mine, other = objective_of(plain, EPSILON), objective_of(changed, EPSILON)
        assert mine.loss is not other.loss or mine.weights is not other.weights
    else:
        assert Noising.of(plain, EPSILON) != Noising.of(changed, EPSILON)


@pytest.mark.parametrize("changes", [LOSS, NOISE])
def test_losses_and_draws_reach_the_run(settings, changes):
    short = {"epochs": 1, "batch_size": 6, "resolution": 64, "lora_dropout": 0.0}
    plain, changed = (of(train(settings, **short, **more)[0], StepDone)[0] for more in ({}, changes))
    assert abs(plain.loss - changed.loss) > 1e-3


def test_settings_that_contradict_each_other():
    def problems(**settings):
        with pytest.raises(ConfigError) as caught:
            config(**settings)
        return str(caught.value)

    assert "found min_snr_gamma and debiased" in problems(min_snr_gamma=5, debiased_estimation_loss=True)
    assert "noise_offset beside it" in problems(adaptive_noise_scale=0.1)
    assert "less than max_timestep (300)" in problems(min_timestep=300, max_timestep=300)


def test_the_header_says_them_as_kohya_does():
    off = objective_settings(config())
    assert off["min_snr_gamma"] is off["noise_offset"] is off["ip_noise_gamma"] is off["huber_schedule"] is None
    on = objective_settings(config(**ALL))
    assert on["min_snr_gamma"] == 5
    assert (on["loss_type"], on["huber_schedule"], on["huber_c"]) == ("smooth_l1", "snr", 0.1)
    assert on["multires_noise_iterations"] == 6
