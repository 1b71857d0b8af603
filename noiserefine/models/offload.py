"""Running a pipeline and its refiner on a card that does not hold them."""

import accelerate
import torch
from diffusers import DiffusionPipeline

from noiserefine.models.catalogue import OFFLOADS
from noiserefine.refiner import Refiner


def offload(
    pipe: DiffusionPipeline, refiner: Refiner | None, mode: str, device: torch.device | str
) -> None:
    """Set up offloading of the pipeline and the refiner, both on the CPU, in a mode of OFFLOADS.

    Call once, before the first forward.  Raises ValueError for another mode.
    """
    if mode not in OFFLOADS:
        raise ValueError(f"There is no offload mode {mode!r}; choose one of {', '.join(OFFLOADS)}.")
    if mode == "none":
        pipe.to(device)
        if refiner:
            refiner.network.to(device)
    elif mode == "model":
        pipe.enable_model_cpu_offload(device=device)
        if refiner:
            _, refiner.offload_hook = accelerate.cpu_offload_with_hook(refiner.network, device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
        if refiner:
            accelerate.cpu_offload(refiner.network, device)
