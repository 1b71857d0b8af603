"""Noise refining networks to compare the refiner with, for train_refiner.py's `--network`.

Other parametrisations, no pretraining, a Gaussian for every prompt: all of them correct x_T by what
`correction` returns. They are experiments: evaluate.py loads their files, with the same
`--network`, and neither the app nor plain diffusers does.
"""

import json
import math
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from noiserefine.checkpoint import CONFIG_NAME, RefinerConfig, check_tensors, read_tensors
from noiserefine.denoiser import denoiser
from noiserefine.lora import with_lora
from noiserefine.refiner import Refiner
from train.common import atomic, write_json

WEIGHTS_NAME = "network.safetensors"


def check_unet(pipe: DiffusionPipeline, title: str, prompt_alone: bool) -> None:
    """Raise ValueError unless the pipeline's denoiser is a UNet of Stable Diffusion.

    title: what takes no other, for the message.
    prompt_alone: whether the UNet may read no more than the prompt's embeddings, as SDXL's does.
    """
    network = denoiser(pipe)
    if not isinstance(network, UNet2DConditionModel):
        raise ValueError(
            f"{title} takes Stable Diffusion's UNets only; the denoiser of {type(pipe).__name__} "
            f"is a {type(network).__name__}."
        )
    if prompt_alone and (network.config.addition_embed_type or network.config.encoder_hid_dim_type):
        raise ValueError(
            f"{title} takes UNets that read the prompt's embeddings alone; that of "
            f"{type(pipe).__name__} reads more."
        )


class Alternative(Refiner, ABC):
    """A refining network that is not the refiner, saved as the tensors that training changes."""

    name: str
    prompt_alone = False  # whether it knows no other input of the UNet

    @classmethod
    def create(
        cls,
        pipe: DiffusionPipeline,
        rank: int = 128,
        alpha: float | None = None,
        guidance_scale_range: list[float] | None = None,
        layers: str | None = None,
    ) -> "Alternative":
        """Return the untrained network.

        Raise ValueError for a guidance_scale_range or layers, and for a model without a UNet.
        """
        check_unet(pipe, f"The network {cls.name}", cls.prompt_alone)
        if layers is not None:
            raise ValueError(f"The network {cls.name} has no LoRA's layers: leave --layers out.")
        if guidance_scale_range is not None:
            raise ValueError(
                f"The network {cls.name} takes no guidance scale: leave --guidance_scale_range out."
            )
        config = Refiner.create(pipe, rank, alpha).config
        config.parametrisation = cls.name
        return cls(pipe, config, cls.build(pipe, config))

    @classmethod
    @abstractmethod
    def build(cls, pipe: DiffusionPipeline, config: RefinerConfig) -> Any:
        """Return the network, which is called as the pipeline's UNet is."""

    def trained(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are not the pipeline's."""
        shared = {id(parameter) for parameter in self.pipe.unet.parameters()}
        return {
            name: parameter.data
            for name, parameter in self.network.named_parameters()
            if id(parameter) not in shared
        }

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the trained tensors, in this precision or their own, and refiner.json."""
        tensors = {name: value.to(dtype).contiguous() for name, value in self.trained().items()}
        with atomic(Path(folder) / WEIGHTS_NAME) as part:
            save_file(tensors, part)
        write_json(Path(folder) / CONFIG_NAME, asdict(self.config))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, pipe: DiffusionPipeline, merge: bool | None = None
    ) -> "Alternative":
        """Load what `save_pretrained` wrote. Raise ValueError for another network's files."""
        config = json.loads((Path(name_or_path) / CONFIG_NAME).read_text())
        if config["parametrisation"] != cls.name:
            raise ValueError(f"{name_or_path} is a {config['parametrisation']}, not a {cls.name}.")
        network = cls.create(pipe, config["rank"])
        path, trained = Path(name_or_path) / WEIGHTS_NAME, network.trained()
        state = read_tensors(path)
        check_tensors(path, state, trained)
        for name, value in state.items():
            trained[name].copy_(value)
        return network


class Raw(Alternative):
    """x_T + UNet_lora(x_T): section 3.3's residual as it is written, which starts far from x_T."""

    name = "raw"

    @classmethod
    def build(cls, pipe: DiffusionPipeline, config: RefinerConfig) -> UNet2DConditionModel:
        """Return the UNet with a LoRA whose last layer is not cancelled."""
        unet = with_lora(pipe.unet, config.rank, config.alpha, config.target_modules, config.head)
        unet.conv_out.get_base_layer().bias = pipe.unet.conv_out.bias
        return unet


class Difference(Raw):
    """x_T + UNet_lora(x_T) - UNet(x_T): starts at x_T, and costs a second forward."""

    name = "difference"

    def predict(
        self, network: ModelMixin, x_T: torch.Tensor, embeds: dict[str, Any]
    ) -> torch.Tensor:
        """Return the difference of the two forwards, (B, C, h, w)."""
        with torch.no_grad():
            base = super().predict(self.pipe.unet, x_T, embeds)
        return super().predict(network, x_T, embeds) - base


class Autocast(Alternative):
    """A network whose own weights stay in float32, at the pipeline's precision."""

    def predict(
        self, network: ModelMixin, x_T: torch.Tensor, embeds: dict[str, Any]
    ) -> torch.Tensor:
        """Return the network's output under autocast, (B, C, h, w)."""
        enabled = self.dtype != torch.float32
        with torch.autocast(x_T.device.type, self.dtype, enabled=enabled):
            return super().predict(network, x_T, embeds)


class Scratch(Autocast):
    """The same UNet without pretrained weights, trained whole (table 14).

    Its last layer starts at zero, so the network starts at x_T.
    """

    name = "scratch"

    @classmethod
    def build(cls, pipe: DiffusionPipeline, config: RefinerConfig) -> UNet2DConditionModel:
        """Return a UNet with random weights."""
        unet = UNet2DConditionModel.from_config(pipe.unet.config).to(pipe.device)
        nn.init.zeros_(unet.conv_out.weight)
        nn.init.zeros_(unet.conv_out.bias)
        return unet


class GaussianOfPrompt(nn.Module):
    """A two-layer MLP on the mean prompt embedding: mean and standard deviation of the noise.

    It predicts both as corrections, of 0 and of 1, and is called by the pipeline in its UNet's
    place.
    """

    def __init__(self, unet: UNet2DConditionModel, hidden: int = 512):
        super().__init__()
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype
        side = unet.config.sample_size
        self.shape = (unet.config.in_channels, side, side)
        self.layers = nn.Sequential(
            nn.Linear(unet.config.cross_attention_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * math.prod(self.shape)),
        ).to(self.device)
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_
    ) -> tuple[torch.Tensor]:
        """Return the correction of x, (B, C, h, w), by the prompts' moments."""
        moments = self.layers(encoder_hidden_states.mean(1)).view(len(x), 2, *self.shape)
        mean, log_deviation = moments.unbind(1)
        return (mean + (log_deviation.exp() - 1) * x,)


class Mlp(Autocast):
    """x_T moved to N(mu, sigma^2) of the prompt (A.9.2, table 10), at the model's native size."""

    name = "mlp"
    prompt_alone = True

    @classmethod
    def build(cls, pipe: DiffusionPipeline, config: RefinerConfig) -> GaussianOfPrompt:
        """Return an MLP that starts at mean 0 and deviation 1."""
        return GaussianOfPrompt(pipe.unet)
