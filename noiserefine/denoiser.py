"""A pipeline's denoiser as the pipeline itself uses it, found by calling the pipeline.

Pipelines pack latents, join conditions, flip signs and drop channels, each family in its own way.
None of that is repeated here: the user's unmodified pipeline is called with another network for
its denoiser and with a scheduler whose `step` ends the call, and what `step` is given is the
prediction in the space of the latents.
"""

import contextlib
import copy
import functools
import inspect
import math
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from torch import nn
from torch.utils._pytree import tree_map

DENOISERS = ("unet", "transformer", "prior")


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """Return the name of the pipeline's denoiser: unet, transformer or prior.

    Raises ValueError for a pipeline that has none of them.
    """
    for name in DENOISERS:
        if getattr(pipe, name, None) is not None:
            return name
    raise ValueError(f"{type(pipe).__name__} has no denoiser: none of {', '.join(DENOISERS)}.")


def denoiser(pipe: DiffusionPipeline) -> Any:
    """Return the network that predicts noise or velocity, without torch.compile around it."""
    network = getattr(pipe, denoiser_name(pipe))
    return getattr(network, "_orig_mod", network)


def precision(network: nn.Module) -> torch.dtype:
    """Return the network's precision, read off one layer; diffusers' own property walks all.

    Weights of 8 bits are storage only: layerwise casting computes in the precision of the others.
    """
    return next(
        p.dtype for p in network.parameters() if p.is_floating_point() and p.dtype.itemsize > 1
    )


def stored_in_8_bits(network: nn.Module) -> bool:
    """Return whether layerwise casting stores some of the network's weights in 8 bits."""
    return any(p.dtype.itemsize == 1 for p in network.parameters())


def with_parts(
    pipe: DiffusionPipeline,
    network: nn.Module | None = None,
    scheduler: SchedulerMixin | None = None,
) -> DiffusionPipeline:
    """Return the same pipeline with another denoiser or scheduler; the given one stays as it is."""
    twin = copy.copy(pipe)
    if network is not None:
        vars(twin)[denoiser_name(pipe)] = network
    if scheduler is not None:
        vars(twin)["scheduler"] = scheduler
    return twin


def call_parameters(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """Return what the pipeline's call takes, by name."""
    kind: Any = type(pipe)
    return _parameters(kind)


@functools.cache
def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.__call__).parameters


@functools.cache
def _placed(kind: type, device: torch.device) -> type:
    """Return the class with a fixed `_execution_device`.

    The pipeline's own property searches all modules at every step.
    """
    return type(
        kind.__name__, (kind,), {"_execution_device": device, "__module__": kind.__module__}
    )


# The first step


class FirstStep(NamedTuple):
    """What a pipeline hands its scheduler's first step, in the scheduler's layout of latents."""

    prediction: torch.Tensor
    timestep: torch.Tensor
    sample: torch.Tensor


class _Reached(Exception):
    """End a pipeline's call, with what it had come to."""


_STARTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by scheduler; see below


def pure_noise_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return a scheduler that starts at t = T from unit variance, and whose `step` ends the call.

    It starts there in any number of steps: DDIM with "trailing" timesteps for models with a beta
    schedule; flow matching starts at sigma = 1 in any case, and consistency models' schedulers at
    T.  It is made once for each scheduler and config.
    """
    config, start = _STARTS.get(scheduler, (None, None))
    if config is scheduler.config:
        return start
    config = scheduler.config
    flows, consistency = config.get("use_flow_sigmas"), "original_inference_steps" in config
    if "beta_schedule" in config and not flows and not consistency:
        start = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    else:
        start = copy.deepcopy(scheduler)

    @functools.wraps(start.step)  # pipelines read from the signature what the scheduler takes
    def step(model_output, timestep, sample, *args, **kwargs):
        raise _Reached(FirstStep(model_output, timestep, sample))

    start.step = step
    _STARTS[scheduler] = config, start
    return start


def first_step(pipe: DiffusionPipeline, network: nn.Module, **call) -> FirstStep:
    """Return what the pipeline, with this network, hands its scheduler's first step, at t = T.

    network  in the place of the pipeline's denoiser; it makes one forward
    call     the arguments of the pipeline's call, among them `latents` on the device of the models

    The prediction has gradients where they are enabled now, although pipelines are called under
    no_grad.
    """
    enabled = torch.is_grad_enabled()

    def enable(module: nn.Module, args: tuple) -> None:
        torch.set_grad_enabled(enabled)  # until no_grad ends, whose exit restores what was before

    twin = with_parts(pipe, network, pure_noise_scheduler(pipe.scheduler))
    kind: Any = type(pipe)
    twin.__class__ = _placed(kind, call["latents"].device)
    twin.set_progress_bar_config(disable=True)
    handle = network.register_forward_pre_hook(enable)
    try:
        twin(num_inference_steps=2, **call)  # `enable` ends the call before the first one
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipe).__name__} ended without a step of its scheduler.")


def silent(network: nn.Module, output: Any) -> nn.Module:
    """Return a copy of the network whose forward only returns zeros shaped like `output`."""
    twin = copy.copy(network)
    twin._forward_pre_hooks, twin._forward_hooks = OrderedDict(), OrderedDict()
    zeros = tree_map(torch.zeros_like, output)
    twin.forward = lambda *args, **kwargs: zeros
    return twin


# Guidance


def guidance_kind(pipe: DiffusionPipeline) -> str:
    """Return "embedded" where the network takes a guidance scale as an input, else "cfg".

    An embedded scale costs no forward and stays as the pipeline's caller sets it; classifier-free
    guidance is then possible only where the pipeline offers it beside, `can_guide`.
    """
    config = denoiser(pipe).config
    embedded = config.get("guidance_embeds") or config.get("time_cond_proj_dim") is not None
    return "embedded" if embedded else "cfg"


def _guides(pipe: DiffusionPipeline, scale: float, default: bool) -> bool:
    """Return whether the pipeline guides at this scale; `default` if it does not say."""
    probe = copy.copy(pipe)
    probe._guidance_scale = scale
    return bool(getattr(probe, "do_classifier_free_guidance", default))


def can_guide(pipe: DiffusionPipeline) -> bool:
    """Return whether the pipeline offers classifier-free guidance."""
    if "true_cfg_scale" in call_parameters(pipe):
        return True
    return guidance_kind(pipe) == "cfg" and _guides(pipe, 7.0, default=True)


def guidance_arguments(pipe: DiffusionPipeline, guidance_scale: float = 1.0) -> dict[str, float]:
    """Return the pipeline's own arguments for diffusers' g in e_u + g (e_c - e_u); 1 is unguided.

    Some pipelines call it true_cfg_scale, and some count from 0: their scale is g - 1.  Raises
    ValueError for a g above 1 where the pipeline offers no classifier-free guidance.
    """
    if guidance_scale != 1 and not can_guide(pipe):
        raise ValueError(
            f"{type(pipe).__name__} offers no classifier-free guidance with this model, which "
            "takes guidance as an input of its network or was distilled from guided samples: "
            "sample it with guidance_scale 1."
        )
    if "true_cfg_scale" in call_parameters(pipe):
        return {"true_cfg_scale": guidance_scale}
    if guidance_kind(pipe) == "embedded":
        return {}
    from_zero = _guides(pipe, 1.0, default=False)
    return {"guidance_scale": guidance_scale - 1 if from_zero else guidance_scale}


# The canvas


@dataclass(frozen=True)
class Canvas:
    """How the latents of a picture are shaped, and how the pipeline arranges them."""

    height: int  # pixels
    width: int
    shape: tuple[int, ...]  # (C, h, w), as the pipeline draws its noise
    latents: tuple[int, ...]  # of one image in the pipeline's argument `latents`
    sample: tuple[int, ...]  # of one image in the scheduler's samples
    order: torch.Tensor | None  # sample.flatten() = noise.flatten()[order]; None for the same order
    inverse: torch.Tensor | None  # noise.flatten() = sample.flatten()[inverse]
    takes_samples: bool  # whether `latents` is arranged as the scheduler's samples are

    def to_latents(self, x: torch.Tensor) -> torch.Tensor:
        """Return noise (B, C, h, w) as the pipeline takes it for `latents`."""
        return self.to_sample(x) if self.takes_samples else x.reshape(len(x), *self.latents)

    def to_sample(self, x: torch.Tensor) -> torch.Tensor:
        """Return latents (B, C, h, w) as the scheduler sees them."""
        if self.order is not None:
            x = x.flatten(1)[:, self.order.to(x.device)]
        return x.reshape(len(x), *self.sample)

    def from_sample(self, y: torch.Tensor) -> torch.Tensor:
        """Return a scheduler's sample, or a prediction for one, as (B, C, h, w)."""
        if self.inverse is not None:
            y = y.flatten(1)[:, self.inverse.to(y.device)]
        return y.reshape(len(y), *self.shape)


_CANVASES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by denoiser


def canvas(pipe: DiffusionPipeline, height: int | None = None, width: int | None = None) -> Canvas:
    """Return the canvas of pictures of height x width pixels, the model's own size where None.

    It is measured once for each size.  Raises what the pipeline raises for a size that it cannot
    make, and ValueError for a pipeline whose noise cannot be told from its latents.
    """
    canvases, kind = _CANVASES.setdefault(denoiser(pipe), {}), type(pipe)
    if (kind, height, width) not in canvases:
        measured = _measure(pipe, height, width)
        key = kind, measured.height, measured.width  # which None and rounded sizes have too
        canvases[kind, height, width] = canvases.setdefault(key, measured)
    return canvases[kind, height, width]


def canvas_like(pipe: DiffusionPipeline, x: torch.Tensor) -> Canvas:
    """Return the canvas of noise or latents (B, C, h, w).

    Raises ValueError for a shape that the model does not have.
    """
    native = canvas(pipe)
    channels, height, width = native.shape
    expected = f"x_T has shape {tuple(x.shape)}; this model takes (images, {channels}, h, w)"
    if x.ndim != 1 + len(native.shape) or x.shape[1] != channels:
        raise ValueError(f"{expected}.")
    size = (
        round(side * Fraction(pixels, latent))
        for side, pixels, latent in zip(
            x.shape[2:], (native.height, native.width), (height, width), strict=True
        )
    )
    nearest = canvas(pipe, *size)
    if nearest.shape != x.shape[1:]:
        raise ValueError(f"{expected}, of {tuple(nearest.shape)} for the nearest size.")
    return nearest


def as_latents(pipe: DiffusionPipeline, x_T: torch.Tensor) -> torch.Tensor:
    """Return noise (B, C, h, w) as the pipeline takes it for `latents`, on its device."""
    return canvas_like(pipe, x_T).to_latents(
        x_T.to(pipe._execution_device, precision(denoiser(pipe)))
    )


def exact_size(pipe: DiffusionPipeline) -> dict[str, bool]:
    """Return what keeps a pipeline from moving to the nearest size of its training."""
    binning = "use_resolution_binning"
    return {binning: False} if binning in call_parameters(pipe) else {}


def size_arguments(pipe: DiffusionPipeline, height: int, width: int) -> dict[str, Any]:
    """Return the arguments for pictures of exactly height x width pixels."""
    return {"height": height, "width": width} | exact_size(pipe)


def reach_latents(pipe: DiffusionPipeline, **call) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Call the pipeline up to its prepare_latents; return its twin and what prepare_latents got."""
    signature = inspect.signature(pipe.prepare_latents)
    twin = with_parts(pipe, scheduler=pure_noise_scheduler(pipe.scheduler))
    twin.set_progress_bar_config(disable=True)

    @functools.wraps(pipe.prepare_latents)
    def prepare_latents(*args, **kwargs):
        raise _Reached(signature.bind(*args, **kwargs).arguments)

    vars(twin)["prepare_latents"] = prepare_latents
    try:
        twin(num_inference_steps=2, **exact_size(pipe) | call)
    except _Reached as reached:
        del vars(twin)["prepare_latents"]
        return twin, reached.args[0]
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{type(pipe).__name__} makes no picture of a prompt: {error}") from error
    finally:
        pipe.maybe_free_model_hooks()  # the call left its text encoders on the device
    raise RuntimeError(f"{type(pipe).__name__} ended without preparing latents.")


def accepts_scheduler(pipe: DiffusionPipeline, scheduler: SchedulerMixin, **call) -> bool:
    """Return whether the pipeline's call gets to its denoiser with another scheduler.

    call: the arguments of the pipeline's call, its prompt or what `encode_prompt` made of it.
    """
    network = copy.copy(denoiser(pipe))

    def forward(*args, **kwargs):
        raise _Reached

    network.forward = forward
    twin = with_parts(pipe, network, scheduler)
    twin.set_progress_bar_config(disable=True)
    try:
        twin(num_inference_steps=2, generator=torch.Generator(), **exact_size(pipe) | call)
    except _Reached:
        return True
    except (AssertionError, TypeError, ValueError):  # by what the pipeline sets its timesteps
        return False
    finally:
        pipe.maybe_free_model_hooks()
    return False


def _measure(pipe: DiffusionPipeline, height: int | None, width: int | None) -> Canvas:
    """Measure the layout of latents: where 0, 1, 2, ... end up that replace the random numbers."""
    size = {} if height is None or width is None else {"height": height, "width": width}
    twin, arguments = reach_latents(pipe, prompt="", **guidance_arguments(pipe), **size)
    plain = {"device": torch.device("cpu"), "dtype": torch.float64}
    arguments |= {name: value for name, value in plain.items() if name in arguments}
    drawn: list[tuple[int, ...]] = []

    def ramp(shape, *args, **kwargs):
        drawn.append(tuple(shape))
        return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)

    # A copy of the function with another randn_tensor, which no other call of the pipeline sees.
    method = type(pipe).prepare_latents
    draw = types.FunctionType(
        method.__code__,
        method.__globals__ | {"randn_tensor": ramp},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    draw.__kwdefaults__ = method.__kwdefaults__
    sample = _first(draw(twin, **arguments))
    order = (sample / sample.max() * (sample.numel() - 1)).round().long().flatten()
    if not drawn or order.sort().values.ne(torch.arange(len(order))).any():
        raise ValueError(
            f"{type(pipe).__name__}'s latents are no rearrangement of the noise that it draws "
            "with randn_tensor."
        )
    latents, same = drawn[0][1:], order.equal(torch.arange(len(order)))
    takes_samples = latents != sample.shape[1:] and _takes(twin, arguments, sample)
    return Canvas(
        int(arguments["height"]),
        int(arguments["width"]),
        _without_frames(latents),
        latents,
        tuple(sample.shape[1:]),
        None if same else order,
        None if same else order.argsort(),
        takes_samples,
    )


def _without_frames(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return (C, h, w) of a shape with an axis of one frame before or after the channels."""
    *front, height, width = shape
    return (max(front), height, width)


def _first(prepared: Any) -> torch.Tensor:
    """Return the latents of what prepare_latents returned; some add the tokens' positions."""
    return prepared[0] if isinstance(prepared, tuple) else prepared


def _takes(pipe: DiffusionPipeline, arguments: dict[str, Any], sample: torch.Tensor) -> bool:
    """Return whether the pipeline takes samples, as its scheduler sees them, for `latents`."""
    try:
        prepared = _first(pipe.prepare_latents(**arguments | {"latents": sample}))
    except (ValueError, RuntimeError):
        return False
    return prepared.shape == sample.shape


# Forwards, counted


def first_argument(args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return the images that a denoiser is called with: a tensor, or a list of one for each."""
    names = ("hidden_states", "sample", "x")
    return args[0] if args else next(kwargs[name] for name in names if name in kwargs)


class ForwardCounter:
    """Count the images that pass through networks: a guided step counts two."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def watch(self, *networks: nn.Module) -> Iterator["ForwardCounter"]:
        """Count while the context is open."""

        def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.count += len(first_argument(args, kwargs))

        handles = [n.register_forward_pre_hook(count, with_kwargs=True) for n in networks]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


# What can be refined


def check_refinable(pipe: DiffusionPipeline) -> None:
    """Raise ValueError, with what is missing, for a pipeline that no refiner can be made for.

    No network is called.
    """
    denoiser_name(pipe)
    check_class(type(pipe))


def check_class(kind: type[DiffusionPipeline]) -> None:
    """Raise ValueError, with what is missing, for a pipeline's class, as `check_refinable` does."""
    name, parameters = kind.__name__, inspect.signature(kind.__call__).parameters
    if "num_frames" in parameters:
        reason = "makes videos; a refiner corrects the noise of single pictures"
    elif "mask_image" in parameters or {"image", "strength"} <= parameters.keys():
        reason = "changes a given picture; a refiner needs one that makes pictures from noise alone"
    elif "latents" not in parameters:
        reason = "takes no `latents`, so the noise that it starts from cannot be refined"
    elif "prompt" not in parameters:
        reason = "takes no `prompt`, which a refiner reads"
    elif not hasattr(kind, "prepare_latents"):
        reason = "has no prepare_latents, which tells how its noise is shaped"
    else:
        return
    raise ValueError(f"{name} cannot be refined: it {reason}.")
