"""The refiner g_phi: a LoRA on the pipeline's own denoiser that corrects x_T in one forward.

Paper, section 3.3.
"""

import contextlib
import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import set_peft_model_state_dict

from noiserefine import checkpoint, lora
from noiserefine.checkpoint import RefinerConfig
from noiserefine.denoiser import (
    canvas_like,
    check_refinable,
    denoiser,
    denoiser_name,
    first_step,
    guidance_arguments,
    precision,
    silent,
    size_arguments,
)
from noiserefine.limits import MAX_STRENGTH
from noiserefine.noise import encode_prompt, encoding_for


class Refiner:
    """x_T -> x_T + strength * correction, for the pipeline it was made with.

    The refining network is a second tree of modules over the pipeline's own parameters, so the
    pipeline's denoiser is never touched, wrapped or toggled, and its weights are not copied.
    Merged, the layers with a LoRA get weights of their own: nearly a second denoiser in memory,
    and the speed of a plain forward.
    """

    note = ""  # what to say of a pipeline that is not the base, in a sentence
    source: str | None = None  # the folder or hub id that it was loaded from
    weights_sha256: str | None = None  # of the LoRA's file, which tells one refiner from another
    offload_hook: Any = None  # sends the network back to the CPU after its pass; see offload.py

    def __init__(self, pipe: DiffusionPipeline, config: RefinerConfig, network: ModelMixin):
        self.pipe, self.config, self.network = pipe, config, network

    @classmethod
    def create(
        cls,
        pipe: DiffusionPipeline,
        rank: int = 128,
        alpha: float | None = None,
        guidance_scale_range: list[float] | None = None,
        layers: str | None = None,
    ) -> "Refiner":
        """Return an untrained refiner, the identity: its last layer's LoRA is minus that layer.

        guidance_scale_range: lowest and highest of the guidance scales it will take as an input
        (appendix A.4), through a projection that starts at zero; None for none.
        layers: a regular expression that is searched for in the layers' names: those without a
        match get no LoRA, except the last one; None for all.
        Raises ValueError for an expression that no layer matches, and for a pipeline that cannot be
        refined, with what is missing.
        """
        check_refinable(pipe)
        base = denoiser(pipe)
        found = lora.trace(pipe, lora.plain_twin(base))
        if layers is not None:
            targets = lora.matching(base, found.targets, layers)
            found = found._replace(targets=[*targets, found.head])
        if guidance_scale_range is not None and found.vector is None:
            raise ValueError(
                f"No layer of {type(base).__name__} reads a vector, to which a guidance scale "
                "could be added: train its refiner for one scale."
            )
        config = RefinerConfig(
            rank=rank,
            alpha=rank if alpha is None else alpha,
            prediction_type=checkpoint.prediction_type(pipe),
            architecture=checkpoint.architecture(base),
            base_model=pipe.name_or_path or "an unnamed model",
            base_signature=checkpoint.signature(base),
            base_revision=checkpoint.revision(pipe),
            timestep=found.timestep,
            target_modules=found.targets,
            head=found.head,
            vector=found.vector,
            adds_input=found.adds_input,
            guidance_scale_range=guidance_scale_range and [*map(float, guidance_scale_range)],
        )
        network = build(base, config)
        lora.cancel(network.get_submodule(config.head))
        return cls(pipe, config, network)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, pipe: DiffusionPipeline, merge: bool | None = None
    ) -> "Refiner":
        """Load a refiner from a folder or a hub repository and check it against the pipeline.

        merge: whether the LoRA is folded into weights of the refiner's own (faster, nearly a
        second denoiser in memory) or stays apart over the pipeline's; None: folded in where that
        takes at most half of the free memory.
        Move the pipeline to its device, and cast its layers, first: the refiner's own weights stay
        as they are made, and the others are the pipeline's.
        Warns (UserWarning) where the pipeline is not the base but may work, a fine-tune.
        Raises FileNotFoundError where there is no refiner, and ValueError where the files are
        damaged or of another format, or the pipeline's denoiser has another architecture or
        prediction type.
        """
        check_refinable(pipe)
        folder, base = checkpoint.resolve(name_or_path), denoiser(pipe)
        config = checkpoint.read_config(folder)
        if reason := checkpoint.misfit(config, pipe):
            raise ValueError(
                f"The refiner {name_or_path} was trained for {config.base_model} and doesn't fit: "
                f"{reason}. Load {config.base_model} or a fine-tune of it, or train a refiner for "
                "this model with train/train_refiner.py."
            )
        path = folder / checkpoint.WEIGHTS_NAME
        state = checkpoint.read_tensors(path)
        checkpoint.check_rank(path, state, config.rank)
        network, prefix = build(base, config), f"{denoiser_name(pipe)}."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        checkpoint.check_tensors(path, state, lora.lora_state(network))
        set_peft_model_state_dict(network, state, adapter_name=lora.ADAPTER)
        if config.guidance_scale_range is not None:
            scale_path, projection = folder / checkpoint.SCALE_NAME, network.scale_input
            state = checkpoint.read_tensors(scale_path)
            checkpoint.check_tensors(scale_path, state, projection.state_dict())
            projection.load_state_dict(state)
        refiner = cls(pipe, config, network)
        refiner.source = str(name_or_path)
        with open(path, "rb") as file:
            refiner.weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        refiner.note = checkpoint.note_on(base, config)
        if refiner.note:
            warnings.warn(refiner.note, stacklevel=2)
        room = lora.free_memory(pipe.device) / 2
        if merge or merge is None and lora.merged_bytes(network) <= room:
            refiner.merge()
        for parameter in set(network.parameters()) - set(base.parameters()):
            parameter.data = parameter.data.to(refiner.dtype)  # the head's LoRA is in single
        return refiner

    def merge(self) -> None:
        """Fold the LoRA into weights of the refiner's own; it is neither saved nor trained then."""
        lora.merge_lora(self.network)

    @property
    def merged(self) -> bool:
        """Return whether the LoRA is folded into the refiner's weights."""
        return not lora.adapted(self.network)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write refiner.json and the LoRA, which pipe.load_lora_weights also reads.

        dtype: precision of the file; None for that of the weights.
        Raises ValueError for a merged refiner.
        """
        if self.merged:
            raise ValueError(
                "This refiner was loaded merged: its LoRA is gone. Load it with merge=False to "
                "save it."
            )
        checkpoint.write(folder, self.pipe, self.network, self.config, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Return the denoiser's precision."""
        return precision(denoiser(self.pipe))

    @property
    def takes_guidance_scale(self) -> bool:
        """Return whether the refiner reads a guidance scale (appendix A.4)."""
        return self.config.guidance_scale_range is not None

    def check_guidance_scale(self, guidance_scale: float | None) -> None:
        """Raise ValueError for a scale that this refiner was not trained for, or cannot take."""
        scales = self.config.guidance_scale_range
        if scales is None:
            if guidance_scale is not None:
                raise ValueError(
                    "This refiner takes no guidance scale: it was trained for one. "
                    "--guidance_scale_range of train/train_refiner.py trains one that does."
                )
            return
        low, high = scales
        if guidance_scale is None or not low <= guidance_scale <= high:
            raise ValueError(
                f"This refiner takes a guidance scale from {low:g} to {high:g}, which it was "
                f"trained for; got {guidance_scale}."
            )

    def scale_input(self, guidance_scale: float) -> float | None:
        """Return the scale where this refiner takes it, else None.

        Raises ValueError for a scale that it was not trained for.
        """
        scale = guidance_scale if self.takes_guidance_scale else None
        self.check_guidance_scale(scale)
        return scale

    def correction(
        self,
        x_T: torch.Tensor,
        embeds: dict[str, Any],
        guidance_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what strength 1 adds to x_T: (B, C, h, w) in float32, with gradient.

        It costs one forward at t = T.

        embeds          what `encode_prompt` returns, for B prompts or for one
        guidance_scale  (B,), diffusers' g, for a refiner that takes it
        """
        scale: Any = contextlib.nullcontext()
        if self.takes_guidance_scale:
            assert guidance_scale is not None and self.config.vector is not None
            scale = lora.scale_given(self.network, self.config.vector, guidance_scale)
        if self.offload_hook:
            self.pipe.maybe_free_model_hooks()  # what an earlier call left on the device
        try:
            with scale:
                return self.predict(self.network, x_T, embeds)
        finally:
            if self.offload_hook:
                self.offload_hook.offload()

    def predict(
        self, network: ModelMixin, x_T: torch.Tensor, embeds: dict[str, Any]
    ) -> torch.Tensor:
        """Return what a network in the denoiser's place predicts at t = T, like x_T in float32.

        What the pipeline itself adds to the network's output is subtracted, where it does:
        SANA-Sprint's adds its input.
        """
        canvas = canvas_like(self.pipe, x_T)
        call = encoding_for(embeds, len(x_T)) | guidance_arguments(self.pipe)
        call |= size_arguments(self.pipe, canvas.height, canvas.width)
        call["latents"] = canvas.to_latents(x_T.to(self.dtype))
        outputs: list[Any] = []
        handle = network.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            prediction = first_step(self.pipe, network, **call).prediction
        finally:
            handle.remove()
        if self.config.adds_input:
            still = first_step(self.pipe, silent(network, outputs[0]), **call)
            prediction = prediction - still.prediction.detach()
        return canvas.from_sample(prediction.float())

    @torch.no_grad()
    def refine(
        self,
        x_T: torch.Tensor,
        prompt: str | list[str] | dict[str, Any],
        strength: float = 1.0,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """Return the refined noise, (B, C, h, w), on the pipeline's device in its precision.

        The sum is made in float32.

        x_T             (B, C, h, w), standard normal, not scaled by the scheduler
        prompt          one for all or one for each, or what `encode_prompt` made of it
        strength        0 returns x_T, 1 is what was trained; from 0 to limits.MAX_STRENGTH
        guidance_scale  the guided sampling to come near to, for a refiner that takes it

        Raises ValueError for an invalid strength or scale, a wrong shape of x_T, or a number of
        prompts that does not match it.
        """
        check_strength(strength)
        self.check_guidance_scale(guidance_scale)
        canvas_like(self.pipe, x_T)
        if strength == 0:
            return x_T.to(self.pipe._execution_device, self.dtype)
        embeds = (
            prompt if isinstance(prompt, dict) else encode_prompt(self.pipe, prompt, guided=False)
        )
        encoded = (value.device for value in embeds.values() if torch.is_tensor(value))
        x_T = x_T.to(next(encoded, None) or self.pipe._execution_device, torch.float32)
        scales = None if guidance_scale is None else torch.full((len(x_T),), guidance_scale)
        return (x_T + strength * self.correction(x_T, embeds, scales)).to(self.dtype)

    def __call__(
        self,
        x_T: torch.Tensor,
        prompt: str | list[str] | dict[str, Any],
        strength: float = 1.0,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """Return what `refine` returns, arranged as the pipeline takes it for `latents`."""
        x_hat = self.refine(x_T, prompt, strength, guidance_scale)
        return canvas_like(self.pipe, x_T).to_latents(x_hat)


def build(base: ModelMixin, config: RefinerConfig) -> ModelMixin:
    """Return the refining network of a config, with a fresh LoRA."""
    network = lora.with_lora(base, config.rank, config.alpha, config.target_modules, config.head)
    if config.guidance_scale_range is not None:
        assert config.vector is not None
        lora.add_scale_input(network, config.vector)
    return network


def check_strength(strength: float) -> None:
    """Raise ValueError for a refinement strength outside 0 to MAX_STRENGTH."""
    if not math.isfinite(strength) or not 0 <= strength <= MAX_STRENGTH:
        raise ValueError(
            f"The refinement strength is a number from 0 to {MAX_STRENGTH}, 1 as trained; got "
            f"{strength}."
        )
