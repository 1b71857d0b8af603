"""The loss against autograd through the whole sampling with detached predictions (equations 4 and
5).
"""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch.autograd.graph import saved_tensors_hooks

from noiserefine import Refiner, draw_noise
from noiserefine.guidance import sample_latents
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import encode_prompt
from noiserefine.samplers import SAMPLERS, make_scheduler, with_sampler

N = 6


def network(x, t):
    """Any nonlinear function will do for the predicted noise."""
    return torch.sin(3 * x + float(t) / 500) + 0.3 * x.roll(1, -1)


def scheduler_for(pipe, sampler, prediction_type):
    scheduler = make_scheduler(sampler, pipe)
    scheduler.register_to_config(prediction_type=prediction_type)
    scheduler.set_timesteps(N)
    return scheduler


def walk(scheduler, x_T):
    """x0 of x_T with the predicted noise detached at every step and nothing else."""
    x, generator = x_T * float(scheduler.init_noise_sigma), torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        if hasattr(scheduler, "sigmas"):
            if scheduler.step_index is None:
                scheduler._init_step_index(t)
            alpha = 1 / (1 + scheduler.sigmas[scheduler.step_index].double() ** 2).sqrt()
        else:
            alpha = scheduler.alphas_cumprod[t].double().sqrt()
        sigma = (1 - alpha**2).sqrt()
        epsilon = network(model_input.detach(), t)  # SG(epsilon_theta)
        prediction = (
            epsilon
            if scheduler.config.prediction_type == "epsilon"
            else (epsilon - sigma * model_input) / alpha
        )
        extra = (
            {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        )
        x = scheduler.step(prediction, t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gradient_is_that_of_detached_sampling(pipe, sampler, prediction_type):
    torch.manual_seed(0)
    x_hat = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    x0 = walk(scheduler_for(pipe, sampler, prediction_type), x_hat)
    (expected,) = torch.autograd.grad(F.mse_loss(x0, target), x_hat)
    gain = sampler_gain(scheduler_for(pipe, sampler, prediction_type), N)
    loss = msd_loss(x0.detach(), x_hat, target, gain)
    (gradient,) = torch.autograd.grad(loss, x_hat)
    assert loss.item() == pytest.approx(F.mse_loss(x0, target).item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=1e-9)


def test_zero_terminal_snr(pipe):
    """Where the sampler starts at T, from pure noise, v is held if the network predicts it, and
    noise cannot be.
    """
    schedulers = {
        spacing: DDIMScheduler.from_config(
            make_scheduler("DDIM", pipe).config,
            rescale_betas_zero_snr=True,
            timestep_spacing=spacing,
        )
        for spacing in ("leading", "trailing")
    }
    schedulers["leading"].set_timesteps(N)
    x_hat, target = (
        torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True),
        torch.zeros(2, 4, 8, 8, dtype=torch.float64),
    )
    x0 = walk(schedulers["leading"], x_hat)
    (expected,) = torch.autograd.grad(F.mse_loss(x0, target), x_hat)
    (gradient,) = torch.autograd.grad(
        msd_loss(x0, x_hat, target, sampler_gain(schedulers["leading"], N)), x_hat
    )
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=1e-9)
    assert schedulers["trailing"].config.prediction_type == "v_prediction"
    held = schedulers["trailing"]
    held.set_timesteps(N)
    ends = []
    for value in (1.0, 0.0):
        x = torch.full((1,), value, dtype=torch.float64)
        for t in held.timesteps:
            x = held.step(torch.tensor([0.3 + float(t) / 500]), t, x).prev_sample
        ends.append(x.item())
    assert sampler_gain(held, N) == pytest.approx(ends[0] - ends[1], rel=1e-6)
    held.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="signal-to-noise ratio is zero"):
        sampler_gain(held, N)


def test_gain_of_ddim_is_equation_26(pipe):
    scheduler = make_scheduler("DDIM", pipe)
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod
    assert sampler_gain(scheduler, 10) == pytest.approx(
        (alphas[0] / alphas[scheduler.timesteps[0]]).sqrt().item(), rel=1e-6
    )
    assert sampler_gain(scheduler, 10) == pytest.approx(8.45, abs=0.01)


def test_ddim_is_stable_diffusions_own_from_any_scheduler(pipe, sdxl):
    """Another scheduler's config lacks settings whose defaults in DDIM would clip latents to [-1,
    1].
    """
    gains = [
        sampler_gain(make_scheduler("DDIM", p), 10)
        for p in (pipe, sdxl, with_sampler(pipe, "Euler"), with_sampler(pipe, "DPM++ 2M"))
    ]
    assert gains == [pytest.approx(8.446, abs=0.001)] * 4


def test_gain_leaves_the_scheduler_alone(pipe):
    scheduler = make_scheduler("DPM++ 2M", pipe)
    before = dict(scheduler.config)
    sampler_gain(scheduler, 7)
    assert dict(scheduler.config) == before and scheduler.num_inference_steps is None


def test_memory_does_not_grow_with_steps(pipe):
    """What autograd keeps for the backward pass of a training step, for N = 2 and N = 8."""
    refiner, x_T, embeds = (
        Refiner.create(pipe, 16),
        draw_noise(pipe, 0),
        encode_prompt(pipe, "a cat", guided=False),
    )

    def kept(steps):
        sizes = []
        with saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            x_hat = x_T + refiner.correction(x_T, embeds)
            x0 = sample_latents(with_sampler(pipe, "DDIM"), x_hat, embeds, steps, 0)
            msd_loss(x0, x_hat, torch.zeros_like(x_T), 8.0).backward()
        return sum(sizes)

    assert kept(8) == kept(2) > 0
