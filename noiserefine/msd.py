"""Multistep score distillation, the loss of section 3.3, which `train.train_refiner` uses."""

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
    at the memory of no step at all.  Since the gain is a scalar, it changes only the gradient's
    length (equation 6).  The squared distance is averaged over the latents, not summed.
    """
    return F.mse_loss(x0.detach() + gain * (x_hat - x_hat.detach()), target)


def sampler_gain(scheduler: SchedulerMixin, num_inference_steps: int) -> float:
    """Return a_1 ... a_T: the derivative of x0 by the starting noise at a constant prediction.

    The scheduler itself is measured: it carries the samples 1 and 0 through all its steps with a
    prediction of zero, and their difference is the gain. This holds for every sampler, stochastic
    ones included, since both samples get the same noise.

    For beta schedules the predicted noise is constant, whatever the network predicts; for DDIM the
    gain is then sqrt(alpha_0 / alpha_T) (equation 26). For flows the velocity is constant. Where
    the last signal-to-noise ratio is zero, v is, because noise alone does not determine x0.

    Raises ValueError if no gain below MAX_GAIN exists, or if the sampler replaces the starting
    noise by noise of its own.
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
            f"This sampler scales the starting noise by {gain} in x0: with a "
            "schedule whose last signal-to-noise ratio is zero and a network that predicts noise, "
            "MSD needs a sampler that starts below t = T, as DDIM does with “leading” timesteps."
        )
    if gain < MIN_GAIN:
        raise ValueError(
            f"{type(scheduler).__name__} scales the starting noise by {gain:.1e} in x0: the noise "
            "that it adds at its steps replaces it. Train with another sampler, or on "
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
