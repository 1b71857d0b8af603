"""The big models' architectures on tensors without data: what calls take, and what memory."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from noiserefine.lora import UNET_TARGETS, with_lora
from train.presets import FORWARDS
from train.tools.architectures import UNETS, build_denoiser

TOKENS = 3  # dimensions; vectors have fewer, maps more


def inputs(name: str, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a denoiser's call for a batch of images, on the meta device."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(batch, *shape, device="meta", dtype=torch.float16)

    t, x = torch.empty(batch, device="meta", dtype=torch.float16), empty(*FORWARDS[name].latents)
    if name in UNETS:
        config, added = UNETS[name], None
        if "addition_embed_type" in config:
            added = {"text_embeds": empty(1280), "time_ids": empty(6)}
        return (x, t, empty(77, config["cross_attention_dim"])), {"added_cond_kwargs": added}
    conditions: dict[str, dict[str, Any]] = {
        "sit": {"class_labels": torch.empty(batch, device="meta", dtype=torch.long)},
        "pixart-sigma": {
            "encoder_hidden_states": empty(300, 4096),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        "sana": {"encoder_hidden_states": empty(300, 2304)},
        "sd35-medium": {
            "encoder_hidden_states": empty(333, 4096),
            "pooled_projections": empty(2048),
        },
        "klein": {
            "hidden_states": empty(4096, 128),  # as tokens
            "encoder_hidden_states": empty(512, 7680),
            "txt_ids": empty(512, 4),
            "img_ids": empty(4096, 4),
        },
    }
    if name in conditions:
        return (), {"hidden_states": x, "timestep": t} | conditions[name]
    images = [torch.empty(16, 1, 128, 128, device="meta", dtype=torch.float16)] * batch
    texts = [torch.empty(128, 2560, device="meta", dtype=torch.float16)] * batch
    return (images, t, texts), {}  # Z-Image takes lists


def meta_denoiser(name: str) -> nn.Module:
    """Return an architecture without data, in 16 bits."""
    with torch.device("meta"):
        return build_denoiser(name).half().requires_grad_(False)


def meta_lora(name: str, network: nn.Module, rank: int) -> nn.Module:
    """Return the refining network of a rank, without data."""
    called = called_layers(name, network)
    targets = UNET_TARGETS
    if name not in UNETS:
        targets = [
            layer
            for layer, dimensions in called.items()
            if dimensions >= TOKENS and getattr(network.get_submodule(layer), "groups", 1) == 1
        ]
    with torch.device("meta"):
        return with_lora(network, rank, rank, targets, list(called)[-1])


def autocast_as_on_cuda(network: nn.Module) -> nn.Module:
    """Return a network in 16 bits whose normalisations run in single precision, as CUDA's autocast.

    Tensors without data know no autocast; it matters, since a backward pass keeps their inputs.
    """

    def cast(dtype: torch.dtype) -> Callable[..., tuple]:
        return lambda module, args: tuple(
            value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for value in args
        )

    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            module.float().register_forward_pre_hook(cast(torch.float32))
            if isinstance(module, nn.RMSNorm):  # of queries and keys, which attention casts back
                module.register_forward_hook(lambda module, args, result: result.half())
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(cast(torch.float16))
    return network


def lora_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that training changes."""
    return [p for name, p in network.named_parameters() if "lora_" in name]


def called_layers(name: str, network: nn.Module) -> dict[str, int]:
    """Return the linear layers and convolutions that a forward calls, and their inputs' dimensions.

    They are in the order of their last calls.
    """
    called: dict[str, int] = {}

    def record(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            called.pop(layer, None)
            called[layer] = next(iter((*args, *kwargs.values()))).ndim

        return hook

    handles = [
        module.register_forward_pre_hook(record(layer), with_kwargs=True)
        for layer, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    args, kwargs = inputs(name, 1)
    with torch.no_grad():
        network(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return called


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are alive, beside a network's own.

    max_side: of a feature map; what is square and larger is an attention map, queries by keys,
    which fused attention never makes.
    """

    def __init__(self, network: nn.Module, max_side: int = 128):
        super().__init__()
        self.max_side, self.now, self.peak = max_side, 0, 0
        tensors = [*network.parameters(), *network.buffers()]
        self.counted = weakref.WeakSet(tensor.untyped_storage() for tensor in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Call the operator and count what it made."""
        made = func(*args, **kwargs or {})
        for tensor in filter(torch.is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            if storage not in self.counted and not self._is_attention_map(tensor):
                self.counted.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _is_attention_map(self, tensor: torch.Tensor) -> bool:
        return tensor.ndim >= TOKENS and tensor.shape[-2] == tensor.shape[-1] > self.max_side

    def _add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)
