"""Multistep score distillation, the paper's loss (section 3.3)."""

import copy

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin


def msd_loss(
    x0: torch.Tensor, x_hat: torch.Tensor, target: torch.Tensor, gain: float
) -> torch.Tensor:
    """L_MSD of equation 4: the squared distance between the unguided image and the guided one.

    x0      (B, C, h, w)  latents sampled without guidance and without gradient from x_hat, in N steps
    x_hat   (B, C, h, w)  the refined noise, with gradient
    target  (B, C, h, w)  latents sampled with guidance from the same x_T
    gain    the product of equation 5's a_t over the steps, `sampler_gain`

    Every step F_t(x) = a_t x + b_t SG(e(x)) (equation 5) is affine in x once the predicted noise e is
    detached, so the whole sampling is  x0 = (a_1 ... a_T) x_hat + terms without gradient.  Adding
    gain * (x_hat - SG(x_hat)) to the sampled x0 therefore has equation 4's value and its exact gradient,
    at the memory of no step at all.
    """
    return F.mse_loss(x0.detach() + gain * (x_hat - x_hat.detach()), target)


def sampler_gain(scheduler: SchedulerMixin, num_inference_steps: int) -> float:
    """a_1 ... a_T: what the starting noise is multiplied by on its way to x0 while predicted noise is held.

    Read off the scheduler itself: it carries the samples 1 and 0 through all its steps with a noise
    prediction of zero, and their difference is the gain; so it holds for every sampler, stochastic ones
    included (both draw the same noise).  For DDIM it is sqrt(alpha_0 / alpha_T) (equation 26).

    Raises ValueError where it is not finite: with zero terminal SNR x0 cannot be told from predicted noise.
    """

    def carry(value: float) -> float:
        walker = copy.deepcopy(scheduler)
        walker.register_to_config(
            prediction_type="epsilon"
        )  # equation 5 detaches the noise, whatever the network predicts
        walker.set_timesteps(num_inference_steps)
        sample = torch.full((1, 1, 1, 1), value, dtype=torch.float64) * float(
            walker.init_noise_sigma
        )
        generator = (
            {"generator": torch.Generator().manual_seed(0)}
            if "generator" in walker.step.__code__.co_varnames
            else {}
        )
        for t in walker.timesteps:
            prediction = torch.zeros_like(walker.scale_model_input(sample, t))
            sample = walker.step(prediction, t, sample, **generator).prev_sample.double()
        return sample.item()

    gain = carry(1.0) - carry(0.0)
    if not 0 < abs(gain) < 1e6:
        raise ValueError(
            f"This sampler carries the starting noise to x0 with a factor of {gain}: with a schedule whose last "
            "signal-to-noise ratio is zero, MSD needs a sampler that starts below t = T, such as DDIM “leading”."
        )
    return gain
