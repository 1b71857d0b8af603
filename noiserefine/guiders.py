"""diffusers' guiders in any pipeline: guidance in a part of the steps, rescaled or projected.

A pipeline combines what its network predicts for the prompt, e_c, and for the empty one, e_u, to
e_u + g (e_c - e_u).  A guider combines them to another e*.  The network of `with_guider` therefore
returns, in the place of e_u,

    e_c + (e_c - e*) / (g - 1),

of which the pipeline makes e*; and where the guider asks for no guidance e_c itself, which costs
no forward.
"""

import copy
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import AdaptiveProjectedGuidance, BaseGuidance, ClassifierFreeGuidance
from diffusers.utils import logging
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from noiserefine.denoiser import (
    canvas,
    denoiser,
    denoiser_name,
    first_argument,
    first_step,
    guidance_arguments,
    precision,
    size_arguments,
    with_parts,
)
from noiserefine.noise import encode_prompt

# Each guider made says that their interface may change.
logging.get_logger("diffusers.guiders.guider_utils").setLevel(logging.ERROR)
# By name, of g; "cfg" is the pipeline's own.  The interval is Kynkäänniemi et al.'s (2024) for
# SDXL, as shares of its steps, the rescaling Lin et al.'s (2024).  Sadat et al.'s projection (2024)
# is diffusers' on what the network predicts, without momentum; it counts g from 0.
GUIDERS: dict[str, Callable[[float], BaseGuidance | None]] = {
    "cfg": lambda g: None,
    "interval": lambda g: ClassifierFreeGuidance(guidance_scale=g, start=0.2, stop=0.9),
    "rescale": lambda g: ClassifierFreeGuidance(guidance_scale=g, guidance_rescale=0.7),
    "apg": lambda g: AdaptiveProjectedGuidance(
        guidance_scale=g - 1, eta=0.0, use_original_formulation=True
    ),
}
PROBED_SCALE = 3.0


class EveryKth(ClassifierFreeGuidance):
    """Classifier-free guidance in the first step and every k-th after it."""

    @register_to_config
    def __init__(self, guidance_scale: float, k: int):
        super().__init__(guidance_scale=guidance_scale)
        self.k = k

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step."""
        super().set_state(step, num_inference_steps, timestep)
        if step % self.k:
            self.disable()
        else:
            self.enable()


def forwards_of(guider: BaseGuidance, steps: int) -> int:
    """Return the network's forwards in this many steps: two in a guided step, else one."""
    count = 0
    for step in range(steps):
        guider.set_state(step, steps, None)
        count += guider.num_conditions
    return count


def scale_of(guider: BaseGuidance) -> float:
    """Return a guider's g of e_u + g (e_c - e_u)."""
    return guider.guidance_scale + guider.use_original_formulation


def with_guider(pipe: DiffusionPipeline, guider: BaseGuidance) -> DiffusionPipeline:
    """Return the same pipeline, whose next call, at the guider's scale, follows the guider.

    Raises ValueError for a scale of 1 and for a pipeline that combines its predictions otherwise.
    """
    if scale_of(guider) == 1:
        raise ValueError("A guider with a guidance scale of 1 guides nothing: leave it out.")
    way = _combination(pipe)
    guided = _Guided(getattr(pipe, denoiser_name(pipe)), guider, pipe.scheduler, way)
    return with_parts(pipe, _stand_in(pipe, guided.both if way.axes else guided.next))


class _Combination(NamedTuple):
    """How a pipeline gets its two predictions."""

    prompt_first: bool  # whether the prompt's is before the empty prompt's
    axes: list[int | None] | None  # of each argument's images, two a prompt; None: in two forwards


class _Guided:
    """The forwards of a pipeline's network in one call, as a guider asks for them."""

    def __init__(self, network: nn.Module, guider: BaseGuidance, scheduler: Any, way: _Combination):
        self.network, self.guider, self.scheduler, self.way = network, guider, scheduler, way
        self.step = 0
        self.conditional: Any = None  # of the step in progress, where the empty prompt is to follow

    def both(self, *args, **kwargs) -> Any:
        """Return the predictions for the prompt and the empty one, which share a batch."""
        self._begin_step()
        part = 0 if self.way.prompt_first else 1
        if self.guider.num_conditions == 1:
            values, tree = tree_flatten((args, kwargs))
            assert self.way.axes is not None
            halves = [
                value if axis is None else value.chunk(2, axis)[part]
                for value, axis in zip(values, self.way.axes, strict=True)
            ]
            args, kwargs = tree_unflatten(halves, tree)
            return tree_map(_twice, self.network(*args, **kwargs))
        output = self.network(*args, **kwargs)
        if self._is_plain():
            return output

        def combine(values: Any) -> Any:
            if not torch.is_tensor(values):
                return values
            conditional, unconditional = values.chunk(2)[part], values.chunk(2)[1 - part]
            pair = [conditional, self._replace(conditional, unconditional, channels)]
            return torch.cat(pair if self.way.prompt_first else pair[::-1])

        channels = first_argument(args, kwargs).shape[1]
        return tree_map(combine, output)

    def next(self, *args, **kwargs) -> Any:
        """Return the prediction for the prompt, in the next call that for the empty one."""
        if self.conditional is None:
            self._begin_step()
            self.conditional = self.network(*args, **kwargs)
            return self.conditional
        conditional, self.conditional = self.conditional, None
        if self.guider.num_conditions == 1:
            return conditional
        output = self.network(*args, **kwargs)
        if self._is_plain():
            return output
        channels = first_argument(args, kwargs).shape[1]
        return tree_map(
            lambda c, u: self._replace(c, u, channels) if torch.is_tensor(u) else u,
            conditional,
            output,
        )

    def _begin_step(self) -> None:
        self.guider.set_state(self.step, len(self.scheduler.timesteps), None)
        self.step += 1

    def _is_plain(self) -> bool:
        """Return whether the guider combines as the pipeline itself does."""
        return isinstance(self.guider, ClassifierFreeGuidance) and not self.guider.guidance_rescale

    def _replace(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, channels: int
    ) -> torch.Tensor:
        """Return e_c + (e_c - e*) / (g - 1), in the first channels: some networks have others."""
        e_c, e_u = conditional[:, :channels], unconditional[:, :channels]
        guided = self.guider.forward(e_c, e_u).pred
        replaced = unconditional.clone()
        replaced[:, :channels] = e_c + (e_c - guided) / (scale_of(self.guider) - 1)
        return replaced


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if torch.is_tensor(value) else value


def _stand_in(pipe: DiffusionPipeline, forward: Callable) -> nn.Module:
    """Return the pipeline's denoiser with another forward, and no hooks of its own."""
    network = denoiser(pipe)
    twin = copy.copy(network)
    twin._forward_pre_hooks, twin._forward_hooks = OrderedDict(), OrderedDict()
    twin.forward = functools.wraps(network.forward)(functools.partial(forward))
    return twin


# How a pipeline combines its predictions

_COMBINATIONS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by denoiser


class _Output(tuple):
    """A network's output as pipelines read it: its first entry is its sample."""

    sample = property(lambda self: self[0])


def _combination(pipe: DiffusionPipeline) -> _Combination:
    """Return how the pipeline gets its predictions, measured once for each.

    It is called with a network that predicts 0 for its first image and 1 for its second, of which
    it makes g where the second is the prompt's, and 1 - g where the first is.  What doubles in the
    network's arguments from an unguided call to a guided one are the images.
    """
    found = _COMBINATIONS.setdefault(denoiser(pipe), {})
    if type(pipe) not in found:
        found[type(pipe)] = _find_combination(pipe)
    return found[type(pipe)]


def _find_combination(pipe: DiffusionPipeline) -> _Combination:
    unguided, _ = _probe(pipe, 1.0)
    calls, prediction = _probe(pipe, PROBED_SCALE)
    made = abs(prediction)  # some pipelines flip its sign
    if len(calls) == 1 and made in (PROBED_SCALE, PROBED_SCALE - 1):
        axes = [_doubled(*pair) for pair in zip(unguided[0], calls[0], strict=True)]
        return _Combination(made == PROBED_SCALE - 1, axes)
    if len(calls) == len(("prompt", "empty prompt")) and made == PROBED_SCALE - 1:
        return _Combination(True, None)
    raise ValueError(
        f"{type(pipe).__name__} combines its predictions in a way of its own, which no guider "
        "replaces: choose its own guidance (cfg)."
    )


def _probe(pipe: DiffusionPipeline, guidance_scale: float) -> tuple[list[list[Any]], float]:
    """Return the arguments of each call of the network in a first step, and what is made of it."""
    channels = denoiser(pipe).config.get("out_channels")
    calls: list[list[Any]] = []
    count = 0

    def predict(*args, **kwargs) -> _Output:
        nonlocal count
        x = first_argument(args, kwargs)
        if not torch.is_tensor(x):
            raise ValueError(f"{type(pipe).__name__} hands its network a list: no guider reads it.")
        calls.append(tree_flatten((args, kwargs))[0])
        is_map = x.ndim > len(("image", "token", "channel"))
        shape = (x.shape[0], channels, *x.shape[2:]) if channels and is_map else x.shape
        values = torch.arange(count, count + len(x)).to(x)
        count += len(x)
        return _Output([values.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)])

    size = canvas(pipe)
    noise = torch.zeros(1, *size.shape, dtype=precision(denoiser(pipe)))
    call = encode_prompt(pipe, "", guided=guidance_scale != 1)
    call |= guidance_arguments(pipe, guidance_scale)
    call |= size_arguments(pipe, size.height, size.width)
    call["latents"] = size.to_latents(noise.to(pipe._execution_device))
    prediction = first_step(pipe, _stand_in(pipe, predict), **call).prediction
    return calls, prediction.flatten()[0].item()


def _doubled(one: Any, two: Any) -> int | None:
    """Return the axis along which an argument's second value has twice as much as its first."""
    if not torch.is_tensor(one):
        return None
    sides = zip(one.shape, two.shape, strict=True)
    return next((axis for axis, (a, b) in enumerate(sides) if b == 2 * a and b), None)
