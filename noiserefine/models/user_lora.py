"""A user's LoRA: found, checked, put on a pipeline, weighted and taken off."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import recurse_remove_peft_layers
from huggingface_hub import hf_hub_download
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from noiserefine.checkpoint import CONFIG_NAME, HUB_ERRORS, is_refiner_file
from noiserefine.denoiser import precision
from noiserefine.models.downloads import bar_class
from noiserefine.models.few_steps import few_step_scheduler
from noiserefine.models.lora_formats import Change, change, layers_of, placed, set_alphas
from noiserefine.models.sources import (
    HUB_ID,
    PICKLES,
    exists,
    hub_files,
    is_safetensors,
    local_file,
    read_name,
    sentence,
)

ADAPTER = "style"
NETWORKS = ("unet", "transformer", "prior", "text_encoder", "text_encoder_2", "text_encoder_3")
FINAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers, peft
NUMBERED = re.compile(r"[-_](?:step|epoch|e)?[-_]?\d+$")  # kohya's checkpoints: style-000002


def add_lora(pipe: DiffusionPipeline, name_or_path: str) -> str:
    """Put a user's LoRA on the pipeline as the adapter "style"; return what to say of it.

    name_or_path: a .safetensors file, a folder or a hub repository with one, as `read_name` reads
    them. A few-step LoRA changes the pipeline's scheduler too (see few_steps.py).
    Raises FileNotFoundError where there is none and ValueError where it cannot be used, or where
    the pipeline has a LoRA already; the pipeline is then as it was.
    """
    networks = _networks(pipe)
    if any(isinstance(layer, BaseTunerLayer) for n in networks.values() for layer in n.modules()):
        raise ValueError(
            "This pipeline has a LoRA already: take it off first, by remove_lora or the pipeline's "
            "unload_lora_weights."
        )
    path, note = find_lora(name_or_path)
    state, configs = read_lora(path, name_or_path)
    try:
        layers, words = layers_of(_in_diffusers_names(pipe, state))
        set_alphas(layers, configs)
        found = placed(pipe, networks, layers)
        if not found:
            raise ValueError("matches no layer of this model: it belongs to another family")
        changes = {}
        for (name, module), parts in found.items():
            network = networks[name]
            changes[name, module] = change(
                parts, network.get_submodule(module).weight, precision(network)
            )
        few_steps = few_step_scheduler(pipe, path, read_name(name_or_path))
    except (KeyError, IndexError, TypeError) as error:  # of diffusers' conversion of names
        raise ValueError(
            f"The LoRA {name_or_path} is damaged: its layers' names cannot be read ({error!r})."
        ) from error
    except ValueError as error:
        raise ValueError(f"The LoRA {name_or_path} {sentence(error)}") from error
    for used in {name for name, _ in found}:
        _inject(
            networks[used],
            {module: added for (name, module), added in changes.items() if name == used},
        )
    notes = [note]
    if len(found) < len(layers):
        notes.append(
            f"The LoRA matches {len(found)} of its {len(layers)} layers; the others belong to "
            "another model."
        )
    if words:
        notes.append(
            f"Its bundled embedding of “{'”, “'.join(words)}” is left out: the word has no special "
            "meaning."
        )
    if few_steps:
        pipe.scheduler, says = few_steps
        notes.append(says)
    return " ".join(filter(None, notes))


def find_lora(name_or_path: str) -> tuple[Path, str]:
    """Return the LoRA's file and, where a folder holds several, which was taken.

    Raises FileNotFoundError where there is none, and ValueError where the folder's names leave a
    choice.
    """
    name = read_name(name_or_path)
    if is_safetensors(name):
        return local_file(name), ""
    if not exists(name) and exists(f"{name}.safetensors"):
        return Path(f"{name}.safetensors"), ""
    local = exists(name)
    try:
        if local:
            files = [path.name for path in Path(name).iterdir() if path.is_file()]
        elif HUB_ID.fullmatch(name):
            files = [file for file in hub_files(name) if "/" not in file]
        else:
            raise FileNotFoundError(name)
    except HUB_ERRORS as error:
        raise _no_lora(name_or_path) from error
    file, note = _final(name, files)
    if local:
        return Path(name) / file, note
    try:
        return Path(hf_hub_download(name, file, tqdm_class=bar_class())), note
    except HUB_ERRORS as error:
        raise _no_lora(name_or_path) from error


def _no_lora(name: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"There is no LoRA at {name[:200]}: it is neither a .safetensors file or folder nor a hub "
        "repository that can be reached."
    )


def _final(folder: str, files: list[str]) -> tuple[str, str]:
    """Return which of a folder's files is the LoRA, by trainers' conventions, and a note."""
    if CONFIG_NAME in files:
        raise ValueError(f"{folder} is a refiner, no LoRA: name it in the refiner's field.")
    loras = sorted(file for file in files if is_safetensors(file))
    if not loras:
        pickles = [file for file in files if file.lower().endswith(PICKLES)]
        also = (
            f", only {pickles[0]}, a pickle, which can run code when it is opened"
            if pickles
            else ""
        )
        raise FileNotFoundError(f"{folder} holds no LoRA in a .safetensors file{also}.")
    if len(loras) == 1:
        return loras[0], ""
    final = [file for file in FINAL_NAMES if file in loras]
    # style.safetensors beside style-000002.safetensors is the end of that training
    stems = {Path(file).stem for file in loras}
    ends = [stem for stem in stems if all(_checkpoint_of(other, stem) for other in stems - {stem})]
    final += [f"{stem}.safetensors" for stem in ends]
    if not final:
        shown = ", ".join(loras[:8]) + (", …" if len(loras) > 8 else "")  # noqa: PLR2004
        raise ValueError(
            f"{folder} holds {len(loras)} LoRA files: {shown}. Name one of them, as "
            f"{folder}/{loras[0]}."
        )
    return final[0], f"Of {len(loras)} files in {folder}, {final[0]} was taken."


def _checkpoint_of(stem: str, end: str) -> bool:
    return stem.startswith(end) and NUMBERED.fullmatch(stem[len(end) :]) is not None


def read_lora(path: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """Return a LoRA file's tensors, and peft's configurations by network ("" for all).

    Raises ValueError for a damaged file, one with numbers that are not finite, and a refiner.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The LoRA {name} is damaged or no safetensors file: {sentence(error)}"
        ) from error
    if is_refiner_file(path):
        raise ValueError(
            f"{name} is a refiner, which corrects noise and destroys images as a LoRA: name it in "
            "the refiner's field."
        )
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(
                f"The LoRA {name} is damaged: {key} holds numbers that are not finite, as a "
                "training does that diverged. Take an earlier checkpoint of it."
            )
    return state, _peft_configs(path, metadata)


def _peft_configs(path: Path, metadata: dict[str, str]) -> dict[str, dict]:
    """Return what peft says of scales, from diffusers' metadata or from adapter_config.json."""
    beside = path.parent / "adapter_config.json"
    try:
        if LORA_ADAPTER_METADATA_KEY in metadata:
            configs: dict[str, dict] = {}
            for key, value in json.loads(metadata[LORA_ADAPTER_METADATA_KEY]).items():
                network, _, name = key.partition(".")  # unet.lora_alpha
                configs.setdefault(network, {})[name] = value
            return configs
        if path.name == "adapter_model.safetensors" and beside.is_file():
            return {"": json.loads(beside.read_text(encoding="utf-8"))}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"The LoRA {path} is damaged: its configuration cannot be read ({error})."
        ) from error
    return {}


def _in_diffusers_names(
    pipe: DiffusionPipeline, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename a transformer's LoRA by its pipeline's rules; a UNet's is renamed later."""
    if hasattr(pipe, "unet") or not hasattr(pipe, "lora_state_dict"):
        return state
    converted = pipe.lora_state_dict(dict(state))
    return converted[0] if isinstance(converted, tuple) else converted


def _inject(network: Any, changes: dict[str, Change]) -> None:
    """Add the adapter with these changes of its modules to a network."""
    ranks = {module: len(added.down) for module, added in changes.items()}
    most = Counter(ranks.values()).most_common(1)[0][0]
    # One pattern for all modules of a rank: peft compares every pattern with every module.
    others = {
        f"^({'|'.join(re.escape(module) for module in ranks if ranks[module] == rank)})": rank
        for rank in set(ranks.values()) - {most}
    }
    dora = any(added.magnitude is not None for added in changes.values())
    bias = any(added.bias is not None for added in changes.values())
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules="|".join(re.escape(module) for module in changes),
        use_dora=dora,
        lora_bias=bias,
    )
    state = {}
    for module, added in changes.items():
        weight = network.get_submodule(module).weight
        state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = added.down, added.up
        if bias:
            state[f"{module}.lora_B.bias"] = (
                torch.zeros(len(weight)) if added.bias is None else added.bias
            )
        if dora:
            state[f"{module}.lora_magnitude_vector"] = _magnitude(added, weight)
    dtype = precision(network)
    inject_adapter_in_model(config, network, ADAPTER)
    set_peft_model_state_dict(network, state, ADAPTER)
    network._hf_peft_config_loaded = True  # where diffusers' and transformers' own methods look
    for layer in adapter_layers(network):
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            part.to(layer.get_base_layer().weight.device, dtype).requires_grad_(False)


def _magnitude(added: Change, weight: torch.Tensor) -> torch.Tensor:
    """Return a DoRA's magnitude; for a plain layer beside DoRAs, its own norm."""
    rows = added.magnitude
    if rows is None:
        rows = (weight.float().cpu().flatten(1) + added.up.flatten(1) @ added.down.flatten(1)).norm(
            dim=1
        )
    return rows if weight.ndim == 2 else rows.view(1, -1, 1, 1)  # noqa: PLR2004


def adapter_layers(*networks: nn.Module) -> Iterator[BaseTunerLayer]:
    """Yield the layers of the networks that hold a user's LoRA."""
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, BaseTunerLayer) and ADAPTER in getattr(layer, "lora_A", {}):
                yield layer


def _networks(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the networks that take LoRAs, without torch.compile's modules around them."""
    found = {name: getattr(pipe, name, None) for name in NETWORKS}
    return {
        name: getattr(network, "_orig_mod", network)
        for name, network in found.items()
        if isinstance(network, nn.Module)
    }


def set_lora_weight(pipe: DiffusionPipeline, weight: float) -> None:
    """Multiply what the user's LoRA adds; a negative weight turns a slider LoRA around."""
    for layer in adapter_layers(*_networks(pipe).values()):
        layer.set_scale(ADAPTER, weight)
        layer.enable_adapters(weight != 0)  # a DoRA changes weights even where it adds nothing


def remove_lora(pipe: DiffusionPipeline) -> None:
    """Take the user's LoRA off: the networks are the plain ones again."""
    for network in _networks(pipe).values():
        if any(adapter_layers(network)):
            recurse_remove_peft_layers(network)
            del network.peft_config
            network._hf_peft_config_loaded = False
