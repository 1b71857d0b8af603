"""Training's prompts, encoded once and stored, so that text encoders can leave the device."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map
from tqdm import tqdm

from noiserefine.denoiser import denoiser, precision
from noiserefine.noise import encode_prompt, encoding_for, join_encodings
from train.common import atomic

SHORT, LONG = "a cat", " ".join(["a cat"] * 12)


class Embeds:
    """Prompts as `encode_prompt` makes them, unguided: a file for each, a folder for a precision.

    Pipelines that pad prompts to the longest of a batch, and those without text encoders, encode
    every batch anew: `stored` is False, and text encoders stay on the device in training.
    """

    def __init__(self, pipe: DiffusionPipeline, folder: Path):
        self.pipe = pipe
        self.folder = folder / str(precision(denoiser(pipe))).removeprefix("torch.")
        self.stored = _have_one_size(pipe)

    def make(self, prompts: list[str], accelerator: Accelerator) -> None:
        """Encode the prompts that are not on disk yet, every process its share."""
        if not self.stored:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [prompt for prompt in sorted({*prompts}) if not self._path(prompt).exists()]
        accelerator.wait_for_everyone()  # all processes have seen the same files
        share = missing[accelerator.process_index :: accelerator.num_processes]
        hidden = not accelerator.is_local_main_process
        for prompt in tqdm(share, desc="prompts", disable=hidden):
            encoded = encoding_for(encode_prompt(self.pipe, prompt, guided=False), 1)
            with atomic(self._path(prompt)) as part:
                save_file(_flat(encoded), part)
        accelerator.wait_for_everyone()

    def read(self, prompts: list[str], device: torch.device) -> dict[str, Any]:
        """Return a batch's prompts as the pipeline takes them."""
        if not self.stored:
            return encode_prompt(self.pipe, prompts, guided=False)
        read = {prompt: _nested(load_file(self._path(prompt))) for prompt in {*prompts}}
        return moved(join_encodings([read[prompt] for prompt in prompts]), device)

    def _path(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"


def moved(embeds: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return encoded prompts on a device."""
    return tree_map(lambda value: value.to(device) if torch.is_tensor(value) else value, embeds)


def _have_one_size(pipe: DiffusionPipeline) -> bool:
    """Return whether all prompts become tensors, or lists of tensors, that a batch can join."""
    short, long = (encode_prompt(pipe, text, guided=False) for text in (SHORT, LONG))
    if "prompt" in short or short.keys() != long.keys():
        return False
    return all(
        isinstance(short[name], list) or short[name].shape == long[name].shape for name in short
    )


def _flat(encoded: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return one prompt's tensors by name; a list's by the list's name and their place."""
    flat: dict[str, torch.Tensor] = {}
    for name, value in encoded.items():
        if isinstance(value, list):
            flat |= {f"{name}.{i}": entry for i, entry in enumerate(value)}
        else:
            flat[name] = value
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in flat.items()
    }


def _nested(flat: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what `_flat` made flat; of one prompt, a list has one entry."""
    return {key.split(".")[0]: [value] if "." in key else value for key, value in flat.items()}
