"""The refining network: a LoRA twin of the denoiser, whose last layer starts cancelled.

Paper, section 3.3 and appendix D.1; for the guidance scale as an input appendix A.4.
"""

import contextlib
import copy
import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from noiserefine.denoiser import (
    ForwardCounter,
    canvas,
    denoiser_name,
    first_step,
    guidance_arguments,
    precision,
    silent,
    size_arguments,
)
from noiserefine.noise import encode_prompt, half_size

ADAPTER = "refiner"  # beside whatever adapters the user has on the denoiser
VECTOR = 2  # dimensions of a batch of them; tokens have three, maps four
SCALE_EMBEDDING = 256  # width of the guidance scale's sinusoidal embedding
# UNets: all attention, convolution and feed-forward layers (appendix D.1), by the ends of names.
UNET_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "conv",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv_in",
    "conv_out",
]


class Layers(NamedTuple):
    """The denoiser's layers, as found by tracing a first step."""

    targets: list[str]  # that get a LoRA
    head: str  # the last one with weights, by which the prediction leaves the network
    vector: str | None  # the first linear layer with a vector input, usually the time embedding's
    timestep: float  # t = T in the scheduler's unit
    adds_input: bool  # whether the pipeline adds its input to the network's output


def trace(pipe: DiffusionPipeline, network: ModelMixin) -> Layers:
    """Return the layers of a network like the pipeline's denoiser, as a first step calls them.

    UNets get a LoRA where appendix D.1 has one.  Transformers get one on every linear layer and
    convolution that reads tokens or maps (three or more dimensions; what reads vectors is
    constant at t = T), unless no gradient reaches it.  Raises ValueError for a pipeline that
    cannot be refined.
    """
    modules: dict[nn.Module, str] = {
        module: name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    dimensions: dict[str, int] = {}  # of each layer's input, in the order of the last calls
    nodes: dict[str, Any] = {}  # of each layer's output in autograd's graph
    outputs: list[Any] = []
    vectors: list[str] = []
    zero = torch.zeros((), device=pipe._execution_device, requires_grad=True)

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        name, x = modules[module], next(iter((*args, *kwargs.values())))
        dimensions.pop(name, None)
        dimensions[name] = x.ndim
        if x.ndim == VECTOR and isinstance(module, nn.Linear):
            vectors.append(name)

    def after(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output + zero.to(output.dtype)  # a node of its own, whether weights have gradients
        nodes[modules[module]] = output.grad_fn
        return output

    counter = ForwardCounter()
    handles = [network.register_forward_hook(lambda module, args, output: outputs.append(output))]
    for module in modules:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    small = canvas(pipe, *half_size(pipe))
    noise = torch.randn(1, *small.shape, generator=torch.Generator().manual_seed(0))
    unguided = guidance_arguments(pipe)
    call = unguided | size_arguments(pipe, small.height, small.width)
    call |= {"latents": small.to_latents(noise.to(pipe._execution_device, precision(network)))}
    call |= encode_prompt(pipe, "", guided=False)
    # The graph is only walked, never run: nothing needs to be kept for it.
    nothing = torch.autograd.graph.saved_tensors_hooks(lambda tensor: zero, lambda nothing: zero)
    try:
        with torch.enable_grad(), nothing, counter.watch(network):
            step = first_step(pipe, network, **call)
    finally:
        for handle in handles:
            handle.remove()
    if counter.count > 1:
        raise ValueError(
            f"{type(pipe).__name__} cannot be refined: its guidance cannot be switched off, it "
            f"calls its denoiser {counter.count} times a step with {unguided}."
        )
    reached = _graph(step.prediction.grad_fn)
    with torch.no_grad():
        still = first_step(pipe, silent(network, outputs[0]), **call)
    unet = denoiser_name(pipe) == "unet"
    return Layers(
        UNET_TARGETS
        if unet
        else [
            name
            for name, count in dimensions.items()
            if count > VECTOR
            and getattr(network.get_submodule(name), "groups", 1) == 1
            and nodes[name] in reached
        ],
        list(dimensions)[-1],
        vectors[0] if vectors else None,
        float(torch.as_tensor(step.timestep).flatten()[0]),
        bool(still.prediction.any()),
    )


def _graph(root: Any) -> set[Any]:
    """Return all nodes of autograd's graph behind one."""
    found, stack = {None}, [root]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [following for following, _ in node.next_functions]
    return found - {None}


def matching(network: ModelMixin, targets: list[str], pattern: str) -> list[str]:
    """Return the names of the layers among the targets that a regular expression finds.

    targets: names, or ends of them.  Raises ValueError for an expression that finds none.
    """
    try:
        names = [
            name
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            and any(f".{name}".endswith(f".{target}") for target in targets)
            and re.search(pattern, name)
        ]
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error
    if not names:
        raise ValueError(
            f"No layer's name matches {pattern!r}. The layers are {', '.join(targets)}."
        )
    return names


def plain_twin(network: ModelMixin) -> ModelMixin:
    """Return a second tree of modules over the same parameters, without LoRA.

    The given network stays as it is.  A user's style LoRA is for the images, not for the refining
    pass; one that is fused into the weights stays there.
    """
    tensors = itertools.chain(network.parameters(), network.buffers())
    twin = copy.deepcopy(network, memo={id(tensor): tensor for tensor in tensors})
    if hasattr(twin, "unload_lora"):
        twin.unload_lora()
    _cast_in_forwards(twin, precision(network))
    return twin


def store_in_8_bits(network: ModelMixin, twin: ModelMixin) -> None:
    """Round the weights that a network shares with its twin to 8 bits; LoRAs stay as they are.

    Both compute in the precision they had.
    """
    dtype = precision(network)
    network.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
    registries = (module._diffusers_hook for module in network.modules() if _is_cast(module))
    twin._diffusers_hook = next(registries)  # tells diffusers the twin's precision
    _cast_in_forwards(twin, dtype)


def _cast_in_forwards(twin: ModelMixin, dtype: torch.dtype) -> None:
    """Let layers whose weights layerwise casting stores in 8 bits compute in another precision.

    diffusers' own casting replaces the weights around a forward, and a backward pass would find
    those of 8 bits.  Here a forward casts copies, which autograd keeps.
    """
    for module in twin.modules():
        if "_diffusers_hook" in vars(module):
            vars(module).pop("forward", None)  # the hook's, which calls the shared module
        if any(p.dtype.itemsize == 1 for p in module.parameters(recurse=False)):
            module.forward = functools.partial(_cast_forward, module, dtype)


def _is_cast(module: nn.Module) -> bool:
    registry = vars(module).get("_diffusers_hook")
    return registry is not None and registry.get_hook("layerwise_casting") is not None


def _cast_forward(module: nn.Module, dtype: torch.dtype, *args, **kwargs) -> torch.Tensor:
    computing = copy.copy(module)
    weights = {name: p if p is None else p.to(dtype) for name, p in module._parameters.items()}
    vars(computing)["_parameters"] = weights
    return type(module).forward(computing, *args, **kwargs)


def with_lora(
    network: ModelMixin, rank: int, alpha: float, targets: list[str], head: str
) -> ModelMixin:
    """Return a twin of the network with a fresh LoRA and without the head's bias.

    The head's LoRA has at least the rank of its weight, so that it can cancel it, and is in single
    precision, so that it cancels it exactly.  Raises ValueError for a head that is no layer.
    """
    flags = {parameter: parameter.requires_grad for parameter in network.parameters()}
    twin = plain_twin(network)
    full = min(_layer(twin, head).weight.flatten(1).shape)
    pattern = {f"^{re.escape(head)}": full} if full > rank else {}
    modules = dict(twin.named_modules())
    whole = [f".{target}" for target in targets if target in modules]  # names, no ends of names
    namesakes = [n for n in modules if n not in targets and n.endswith(tuple(whole))]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        exclude_modules=namesakes or None,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
    )
    inject_adapter_in_model(config, twin, ADAPTER)
    for _, layer in adapted(twin):
        if layer.get_base_layer().weight.dtype.itemsize == 1:  # peft makes the LoRA like it
            layer.to(precision(network))
    twin._hf_peft_config_loaded = True  # so that diffusers sees the adapter
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    head_layer = twin.get_submodule(head)
    head_layer.get_base_layer().bias = None
    head_layer.lora_A.float()
    head_layer.lora_B.float()
    return twin


def _layer(network: ModelMixin, name: str) -> nn.Linear | nn.Conv2d:
    """Return a layer by its name. Raises ValueError for a name that is none's."""
    layer = dict(network.named_modules()).get(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"{type(network).__name__} has no layer {name!r}, neither linear nor a convolution: "
            "the refiner's configuration is damaged or belongs to another model."
        )
    return layer


@torch.no_grad()
def cancel(head: LoraLayer) -> None:
    """Set a layer's LoRA to minus its weight, by SVD, so that the sum of both is zero."""
    weight = head.get_base_layer().weight
    u, s, vh = torch.linalg.svd(weight.cpu().double().flatten(1), full_matrices=False)
    down, up = head.lora_A[ADAPTER].weight, head.lora_B[ADAPTER].weight
    down[: len(s)] = (s.sqrt()[:, None] * vh).view(-1, *down.shape[1:])
    scaled = -u * s.sqrt() / head.scaling[ADAPTER]
    up[:, : len(s)] = scaled.view(*scaled.shape, *up.shape[2:])


def adapted(network: ModelMixin) -> list[tuple[str, LoraLayer]]:
    """Return the layers with the refiner's LoRA, by name."""
    return [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A
    ]


@torch.no_grad()
def merge_lora(network: ModelMixin) -> None:
    """Replace every LoRA layer by a plain one with weights of its own; shared ones stay."""
    for name, layer in adapted(network):
        plain = layer.get_base_layer()
        merged = plain.weight.float() + layer.get_delta_weight(ADAPTER).float()
        plain.weight = nn.Parameter(merged.to(_merged_dtype(layer)), requires_grad=False)
        network.set_submodule(name, plain)


def merged_bytes(network: ModelMixin) -> int:
    """Return the bytes of memory that merging the LoRA takes."""
    layers = (layer for _, layer in adapted(network))
    return sum(
        layer.get_base_layer().weight.numel() * _merged_dtype(layer).itemsize for layer in layers
    )


def _merged_dtype(layer: LoraLayer) -> torch.dtype:
    """Return the precision of a layer's merged weight: the sum would not survive 8 bits."""
    dtype = layer.get_base_layer().weight.dtype
    return layer.lora_A[ADAPTER].weight.dtype if dtype.itemsize == 1 else dtype


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on the device, those included that PyTorch keeps for reuse."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def lora_state(network: ModelMixin) -> dict[str, torch.Tensor]:
    """Return the LoRA's tensors by their names in the network."""
    return get_peft_model_state_dict(network, adapter_name=ADAPTER)


def save_lora(
    pipe: DiffusionPipeline,
    network: ModelMixin,
    path: str | Path,
    dtype: torch.dtype | None = None,
    **metadata: str,
) -> None:
    """Write the LoRA to a safetensors file in diffusers' format, with metadata beside its own.

    Pipelines read it by load_lora_weights, those of them that have it.
    dtype: precision of its tensors; None for their own.
    """
    name, config = denoiser_name(pipe), network.peft_config[ADAPTER].to_dict()
    for key in ("target_modules", "exclude_modules"):  # sets, which JSON has not
        config[key] = config[key] and sorted(config[key])
    about = json.dumps({f"{name}.{key}": value for key, value in config.items()}, sort_keys=True)
    save_file(
        {
            f"{name}.{key}": tensor.to(dtype).contiguous()
            for key, tensor in lora_state(network).items()
        },
        path,
        metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: about} | metadata,
    )


# The guidance scale as an input (appendix A.4)


def add_scale_input(network: ModelMixin, layer: str) -> None:
    """Add a projection of the guidance scale's embedding to what a layer reads, zero at first.

    Raises ValueError for a name that is no layer's.
    """
    weight = _layer(network, layer).weight
    network.scale_input = nn.Linear(
        SCALE_EMBEDDING, weight.shape[1], bias=False, device=weight.device, dtype=weight.dtype
    )
    nn.init.zeros_(network.scale_input.weight)


def scale_embedding(guidance_scale: torch.Tensor) -> torch.Tensor:
    """Return sines and cosines, (B, 256), of w = g - 1, (B,), as in Meng et al. (2023)."""
    half = SCALE_EMBEDDING // 2
    rates = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (guidance_scale.float().cpu() - 1)[:, None] * 1000 * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@contextlib.contextmanager
def scale_given(network: ModelMixin, layer: str, guidance_scale: torch.Tensor) -> Iterator[None]:
    """While open, the layer reads the images' guidance scales, (B,), beside its input."""
    embedding = scale_embedding(guidance_scale)

    def add(module: nn.Module, args: tuple) -> tuple:
        x = args[0]
        scale = network.scale_input(embedding.to(x.device, network.scale_input.weight.dtype))
        return (x + scale, *args[1:])

    handle = network.get_submodule(layer).register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()
