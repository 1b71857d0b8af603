"""Multistep score distillation, the paper's loss (section 3.3)."""

import copy
import inspect

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin

from noiserefine.samplers import is_flow, set_steps

MAX_GAIN, MIN_GAIN = 1e6, 1e-4


def msd_loss(
    x0: torch.Tensor, x_hat: torch.Tensor, target: torch.Tensor, gain: float
) -> torch.Tensor:
    """Return L_MSD of equation 4: the squared distance of the unguided image to the guided one.

    x0      (B, C, h, w)  sampled from x_hat in N steps without guidance and gradient
    x_hat   (B, C, h, w)  the refined noise, with gradient
    target  (B, C, h, w)  latents sampled with guidance from the same x_T
    gain    the product of equation 5's a_t over the steps, `sampler_gain`

    Every step is affine in x once what the network predicts is detached (equation 5):

        F_t(x) = a_t x + b_t SG(e(x))                      predicted noise e
        F_t(x) =     x + (sigma_{t-1} - sigma_t) SG(v(x))  flow matching's velocity v: a_t = 1

    So the whole sampling is  x0 = (a_1 ... a_T) x_hat + terms without gradient.  Adding gain *
    (x_hat - SG(x_hat)) to the sampled x0 therefore has equation 4's value and its exact gradient,
    at the memory of no step at all.  The gain is one scalar: whatever is held, the gradient has
    the same direction (equation 6).
    """
    return F.mse_loss(x0.detach() + gain * (x_hat - x_hat.detach()), target)


def sampler_gain(scheduler: SchedulerMixin, num_inference_steps: int) -> float:
    """Return a_1 ... a_T: the factor of the starting noise in x0 while the prediction is held.

    Read off the scheduler itself: it carries the samples 1 and 0 through all its steps with a
    prediction of zero, and their difference is the gain; so it holds for every sampler,
    stochastic ones included (both draw the same noise). Predicted noise is held, whatever the
    network predicts; for DDIM the gain is sqrt(alpha_0 / alpha_T) (equation 26). A flow's
    velocity is, and v where the last signal-to-noise ratio is zero, at which noise does not tell
    x0.

    Raises ValueError where neither gain is finite, and for a sampler that forgets the starting
    noise: with the prediction held nothing of it reaches x0.
    """
    holds_noise = "beta_schedule" in scheduler.config and not is_flow(scheduler)
    held = ["epsilon"] if holds_noise else []
    for prediction_type in [*held, scheduler.config.get("prediction_type")]:
        one, zero = (_carry(scheduler, num_inference_steps, prediction_type, x) for x in (1.0, 0.0))
        gain = abs(one - zero)
        if gain < MAX_GAIN:  # false for one that is not finite too
            break
    if not gain < MAX_GAIN:
        raise ValueError(
            f"This sampler carries the starting noise to x0 with a factor of {gain}: with a "
            "schedule whose last signal-to-noise ratio is zero and a network that predicts noise, "
            "MSD needs a sampler that starts below t = T, such as DDIM “leading”."
        )
    if gain < MIN_GAIN:
        raise ValueError(
            f"{type(scheduler).__name__} carries the starting noise to x0 with a factor of "
            f"{gain:.1e}: what it adds at its steps replaces it. Train with another sampler, or on "
            "the model that this one was distilled from."
        )
    return one - zero


def _carry(
    scheduler: SchedulerMixin, steps: int, prediction_type: str | None, value: float
) -> float:
    """Return what sampling makes of a pixel where a network of this type predicts zero."""
    walker = copy.deepcopy(scheduler)
    if prediction_type is not None:
        walker.register_to_config(prediction_type=prediction_type)
    set_steps(walker, steps)
    sample = torch.full((1, 1, 1, 1), value, dtype=torch.float64)
    sample *= float(getattr(walker, "init_noise_sigma", 1))
    random = "generator" in inspect.signature(walker.step).parameters
    generator = {"generator": torch.Generator().manual_seed(0)} if random else {}
    timesteps = walker.timesteps
    if timesteps[-1] == 0 and "beta_schedule" not in walker.config:  # its end is no step
        timesteps = timesteps[:-1, None]
    for t in timesteps:
        if hasattr(walker, "scale_model_input"):
            walker.scale_model_input(sample, t)
        prediction = torch.zeros_like(sample)
        sample = walker.step(prediction, t, sample, **generator).prev_sample.double()
    return sample.item()
