"""Sampling with classifier-free or perturbed-attention guidance, or both, on one set of weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers.guiders import BaseGuidance
from diffusers.utils import BaseOutput

from noiserefine.denoiser import (
    canvas_like,
    denoiser,
    guidance_arguments,
    precision,
    size_arguments,
)
from noiserefine.guiders import scale_of, with_guider
from noiserefine.noise import step_generator
from noiserefine.samplers import with_step


def sample(
    pipe: DiffusionPipeline,
    *,
    guidance_scale: float = 1.0,
    pag_scale: float = 0.0,
    guider: BaseGuidance | None = None,
    **kwargs,
) -> BaseOutput:
    """Call the pipeline, by default unguided, and leave it as it was found.

    guidance_scale is diffusers' g in e_u + g (e_c - e_u) for every pipeline, so the paper's w of
    equation 31 is g - 1 and 1 means unguided.  pag_scale is s of equation 32; 0 means none.
    guider is diffusers', in the place of the pipeline's own guidance; its scale counts then.
    kwargs go to the pipeline's call.

    Raises ValueError where the pipeline offers no such guidance.
    """
    if guider is not None:
        _check_alone(pag_scale)
        guidance_scale, pipe = scale_of(guider), with_guider(pipe, guider)
    if guidance_scale == 1:
        kwargs = {name: kwargs[name] for name in kwargs if not name.startswith("negative")}
    kwargs |= guidance_arguments(pipe, guidance_scale)
    if "height" in kwargs and "width" in kwargs:
        kwargs |= size_arguments(pipe, kwargs["height"], kwargs["width"])
    if (
        guidance_scale != 1
        and "true_cfg_scale" in kwargs
        and not any(name.startswith("negative") for name in kwargs)
    ):
        prompts = kwargs.get("prompt")
        prompts = kwargs["prompt_embeds"] if prompts is None else prompts
        kwargs["negative_prompt"] = "" if isinstance(prompts, str) else [""] * len(prompts)
    if pag_scale == 0:
        return pipe(**kwargs)
    guided = _with_pag(pipe)
    with _attention_restored(pipe):
        return guided(pag_scale=pag_scale, **kwargs)


def check_guidance(
    pipe: DiffusionPipeline,
    guidance_scale: float,
    pag_scale: float = 0.0,
    guider: BaseGuidance | None = None,
) -> None:
    """Raise ValueError, before anything is sampled, where the pipeline offers no such guidance."""
    guidance_arguments(pipe, guidance_scale)
    if guider is not None:
        _check_alone(pag_scale)
        with_guider(pipe, guider)
    if pag_scale:
        _with_pag(pipe)


def _check_alone(pag_scale: float) -> None:
    if pag_scale:
        raise ValueError(
            "A guider and perturbed-attention guidance do not go together: leave pag_scale at 0."
        )


def _with_pag(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return diffusers' pipeline for perturbed-attention guidance on the same weights.

    Raises ValueError where it has none, and where the network lacks the layers that it perturbs.
    """
    try:
        guided = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True)
    except ValueError as error:
        raise ValueError(
            f"diffusers has no perturbed-attention guidance for {type(pipe).__name__}: leave "
            "pag_scale at 0."
        ) from error
    guided.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    layers = guided.pag_applied_layers
    try:
        with _attention_restored(pipe):
            guided._set_pag_attn_processor(layers, do_classifier_free_guidance=False)
    except ValueError as error:
        raise ValueError(
            f"This {type(denoiser(pipe)).__name__} has no self-attention in its "
            f"{', '.join(layers)} layers, which perturbed-attention guidance replaces: leave "
            "pag_scale at 0."
        ) from error
    return guided


@contextlib.contextmanager
def _attention_restored(pipe: DiffusionPipeline) -> Iterator[None]:
    """Give the denoiser its attention processors back on closing.

    A PAG pipeline swaps them on the shared network and restores them only if nothing interrupts it.
    """
    network = denoiser(pipe)
    processors = dict(network.attn_processors)
    try:
        yield
    finally:
        network.set_attn_processor(processors)


def sample_latents(
    pipe: DiffusionPipeline,
    x_T: torch.Tensor,
    embeds: dict[str, Any],
    steps: int,
    seed: int = 0,
    **guidance: Any,
) -> torch.Tensor:
    """Return x0, (B, C, h, w), without gradient: what the scheduler's last step returns.

    x_T     (B, C, h, w), refined or not
    embeds  what `encode_prompt` returns
    seed    of the noise that stochastic samplers add
    guidance: guidance_scale, pag_scale and guider, as `sample` takes them; unguided by default
    """
    return sample_both(pipe, x_T, embeds, steps, seed, output_type="latent", **guidance)[0]


def sample_both(
    pipe: DiffusionPipeline,
    x_T: torch.Tensor,
    embeds: dict[str, Any],
    steps: int,
    seed: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Return what `sample_latents` returns, and the images that the pipeline makes of it.

    A prior makes image embeddings instead.

    kwargs: guidance, and what else the pipeline's call takes
    """
    canvas, step = canvas_like(pipe, x_T), pipe.scheduler.step
    x_T = x_T.detach().to(pipe._execution_device, precision(denoiser(pipe)))
    last: list[torch.Tensor] = []

    def keep(*args, **kwargs):
        made = step(*args, **kwargs)
        last[:] = [made[0] if isinstance(made, tuple) else made.prev_sample]
        return made

    with with_step(pipe.scheduler, keep):
        made = sample(
            pipe,
            latents=canvas.to_latents(x_T),
            num_inference_steps=steps,
            generator=step_generator(seed),
            height=canvas.height,
            width=canvas.width,
            **kwargs | embeds,
        )
    return canvas.from_sample(last[0]), made[0]
