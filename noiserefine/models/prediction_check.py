"""Whether a network predicts what its scheduler's configuration says: the noise, or v.

Converters forget it.  From a network that predicts v = alpha e - sigma x0, read as one that
predicts the noise e, every step makes noise, and the reverse; two forwards tell them apart.
"""

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from noiserefine.denoiser import (
    canvas,
    denoiser,
    first_step,
    guidance_arguments,
    precision,
    size_arguments,
    with_parts,
)
from noiserefine.noise import encode_prompt, half_size
from noiserefine.samplers import has_beta_schedule

EPSILON, V = "epsilon", "v_prediction"
SHORT = {EPSILON: "epsilon", V: "v"}  # as they may end a source; see loading.py
MIDDLE = 0.3  # of T: the signal outweighs the noise, alpha is 0.77 with Stable Diffusion's schedule
ALL, NONE = 0.8, 0.3  # shares of the noise in a prediction; seen were 1.0 and at most 0.04
FOLLOWS = 0.6  # cosine with the noise; trained networks have 0.8 and more, random ones below 0.2


def check_prediction(source: str, pipe: DiffusionPipeline) -> None:
    """Raise ValueError where the pipeline's scheduler has another prediction than its network.

    Pipelines of other predictions and schedules are not checked.
    """
    if not has_beta_schedule(pipe.scheduler):
        return
    stated = pipe.scheduler.config.get("prediction_type")
    shown = shown_prediction(pipe) if stated in (EPSILON, V) else None
    if shown not in (None, stated):
        raise ValueError(
            f"The scheduler's configuration in {source} says “{stated}”, but its network predicts "
            f"“{shown}”: its pictures would be noise. Name it {source}:{SHORT[shown]}, or "
            f"{source}:{SHORT[stated]} to load it as it says."
        )


@torch.no_grad()
def shown_prediction(pipe: DiffusionPipeline) -> str | None:
    """Return "epsilon" or "v_prediction", as the network's predictions show; None for neither.

    At t = T the input is all noise.  A network that predicts the noise returns it; one that
    predicts v returns a picture with hardly any noise.  So does an untrained network, but of an
    empty picture with noise, at a middle t, only a trained one returns mostly the noise.
    """
    size = canvas(pipe, *half_size(pipe))
    noise = torch.randn(1, *size.shape, generator=torch.Generator().manual_seed(0))
    network, betas = denoiser(pipe), DDIMScheduler.from_config(pipe.scheduler.config).betas
    call = encode_prompt(pipe, "", guided=False) | guidance_arguments(pipe)
    call |= size_arguments(pipe, size.height, size.width)

    def predict(t: int) -> torch.Tensor:
        """Return what the network predicts for sigma_t times the noise."""
        scheduler = DDIMScheduler.from_config(  # whose last timestep is t
            pipe.scheduler.config,
            num_train_timesteps=t + 1,
            trained_betas=betas[: t + 1].tolist(),
            rescale_betas_zero_snr=False,
        )
        sigma = (1 - scheduler.alphas_cumprod[-1]).sqrt()
        latents = size.to_latents(sigma * noise).to(pipe._execution_device, precision(network))
        step = first_step(with_parts(pipe, scheduler=scheduler), network, latents=latents, **call)
        return size.from_sample(step.prediction.float().cpu())

    last = len(betas) - 1
    share = (predict(last) * noise).sum() / noise.square().sum()
    if share > ALL:
        return EPSILON
    if share < NONE:
        cosine = torch.cosine_similarity(
            predict(round(MIDDLE * last)).flatten(), noise.flatten(), 0
        )
        if cosine > FOLLOWS:
            return V
    return None
