"""SiT, a class-conditional flow-matching transformer, as a diffusers pipeline.

Scalable interpolant transformers (Ma et al., 2024) connect data x_* and noise eps by the linear
path x_t = (1 - t) x_* + t eps, and their network predicts the velocity along it.  The published
networks were trained with time reversed: they take s = 1 - t, from noise at 0 to data at 1, and
predict dx/ds = x_* - eps.  diffusers' flow-matching schedulers take sigma = t and
dx/dsigma = eps - x_*.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

ARTICLE = re.compile(r"^(an?|the) ")


class SiTPipeline(DiffusionPipeline):
    """Generate images of a class with SiT.

    The network has DiT's architecture.  FlowMatchEulerDiscreteScheduler makes N equal Euler steps;
    FlowMatchHeunDiscreteScheduler makes N - 1 equal Heun steps from sigma = 1 to 0.001 and an
    Euler step to 0, in 2N - 1 forwards.

    Args:
        transformer: The network.  Its output may have channels after the velocity, as the published
            checkpoints do; they are not used.
        vae: Decodes latents to images.
        scheduler: A flow-matching scheduler with shift 1.
        id2label: Class number -> names separated by commas, as in DiTPipeline.  Saved in
            model_index.json.
        guided_channels: How many channels guidance changes, the first ones: 3 of 4 in the published
            code; None for all.  Saved in model_index.json.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        guided_channels: int | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        id2label = {str(number): names for number, names in (id2label or {}).items()}
        self.register_to_config(id2label=id2label, guided_channels=guided_channels)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.labels = _numbers_of_names(id2label)
        # Published frequencies of the time embedding: 10000^(-i / 128); diffusers' DiT has i / 127.
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0

    @property
    def guidance_scale(self) -> float:
        """Return g of the present call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Return whether the present call is guided."""
        return self._guidance_scale > 1

    @property
    def interrupt(self) -> bool:
        """Return whether a callback has asked to stop."""
        return self._interrupt

    @property
    def no_class(self) -> int:
        """Return the index of the embedding for "no class", one after the last class."""
        return self.transformer.config.num_embeds_ada_norm

    def encode_prompt(self, prompt: str | int | list[str | int]) -> torch.Tensor:
        """Return the class numbers (B,) of class names in any case, numbers, or "" for no class.

        Raises ValueError for an unknown or ambiguous name and for a number out of range.
        """
        prompts = prompt if isinstance(prompt, list | tuple) else [prompt]
        numbers = [self._class_number(str(p).strip()) for p in prompts]
        return torch.tensor(numbers, device=self._execution_device)

    def _class_number(self, prompt: str) -> int:
        if not prompt:
            return self.no_class
        if prompt.lstrip("-").isdecimal():
            if not 0 <= int(prompt) < self.no_class:
                raise ValueError(
                    f"There is no class {prompt}: this model has classes 0 to {self.no_class - 1}."
                )
            return int(prompt)
        text = prompt.casefold()
        numbers = self.labels.get(text) or self.labels.get(ARTICLE.sub("", text), [])
        if len(numbers) == 1:
            return numbers[0]
        if numbers:
            classes = ", ".join(f"{n} ({self.config.id2label[str(n)]})" for n in numbers)
            raise ValueError(f"“{prompt}” names several classes; give a number: {classes}.")
        if not self.labels:
            raise ValueError(
                f"This model has no class names: give a number from 0 to {self.no_class - 1} "
                f"instead of “{prompt}”."
            )
        mentioned = [name for name in self.labels if re.search(rf"\b{re.escape(name)}\b", text)]
        nearest = mentioned or difflib.get_close_matches(text, self.labels, n=3, cutoff=0.5)
        hint = f"The nearest are {', '.join(nearest)}." if nearest else "No name is near."
        raise ValueError(
            f"“{prompt}” is no class of this model, which takes a class name or a number from 0 to "
            f"{self.no_class - 1} for a prompt. {hint}"
        )

    def prepare_latents(  # noqa: PLR0913, PLR0917
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the given latents, or Gaussian noise, (B, C, h, w)."""
        sides = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        shape = (batch_size, num_channels_latents, *sides)
        if latents is None:
            return randn_tensor(shape, generator, device, dtype)
        if latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}, not {shape}.")
        return latents.to(device, dtype)

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        native = self.transformer.config.sample_size * self.vae_scale_factor
        height, width = height or native, width or native
        unit = self.transformer.config.patch_size * self.vae_scale_factor
        if height != width or height % unit:
            raise ValueError(
                f"This model makes square images whose side is a multiple of {unit} pixels, not "
                f"{width} x {height}."
            )
        return height, width

    def _set_timesteps(self, steps: int) -> None:
        """Space sigma equally from 1 to 1 / N, where the scheduler takes a spacing."""
        arguments = inspect.signature(self.scheduler.set_timesteps).parameters
        if "sigmas" in arguments:
            sigmas = np.linspace(1, 1 / steps, steps)
            self.scheduler.set_timesteps(steps, sigmas=sigmas, device=self._execution_device)
        else:
            self.scheduler.set_timesteps(steps, device=self._execution_device)

    def _velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        """Return dx/dsigma (B, C, h, w), guided where classes are followed by as many no_class."""
        sigma = timestep / self.scheduler.config.num_train_timesteps
        x = torch.cat([latents] * (len(classes) // len(latents)))
        prediction = self.transformer(x, timestep=(1 - sigma).expand(len(x)), class_labels=classes)
        velocity = -prediction.sample[:, : latents.shape[1]]
        if not self.do_classifier_free_guidance:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        velocity = unconditional + self.guidance_scale * (conditional - unconditional)
        if (guided := self.config.guided_channels) is not None:
            velocity = torch.cat([velocity[:, :guided], conditional[:, guided:]], 1)
        return velocity

    @torch.no_grad()
    def __call__(  # noqa: PLR0913, PLR0917
        self,
        prompt: str | int | list[str | int],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict | None]
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate one image per prompt.

        Args:
            prompt: Class names or numbers, "golden retriever" or 207; "" is no class.
            height, width: Of the images in pixels, equal; the network's native size by default.
            num_inference_steps: 20 with Euler's and 125 with Heun's method in the paper.
            guidance_scale: g of v_u + g (v_c - v_u); at most 1 is unguided.  The paper's main
                results have 4, those of appendix A.13 have 1.5.
            generator: Draws the initial noise where no latents are given.
            latents: Initial noise (B, C, h, w) of unit variance.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Whether to return an ImagePipelineOutput instead of a tuple.
            callback_on_step_end: Called as in other pipelines; may replace the latents.
            callback_on_step_end_tensor_inputs: What it is handed: latents, or nothing.

        Raises:
            ValueError: For an unknown class, and a size or latents that do not fit the network.
        """
        self._guidance_scale, self._interrupt = guidance_scale, False
        height, width = self._image_size(height, width)
        classes = self.encode_prompt(prompt)
        latents = self.prepare_latents(
            len(classes),
            self.transformer.config.in_channels,
            height,
            width,
            self.transformer.dtype,
            self._execution_device,
            generator,
            latents,
        )
        if self.do_classifier_free_guidance:
            classes = torch.cat([classes, torch.full_like(classes, self.no_class)])
        self._set_timesteps(num_inference_steps)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self.interrupt:
                continue
            velocity = self._velocity(latents, t, classes)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                inputs = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                changed = callback_on_step_end(self, i, t, inputs) or {}
                latents = changed.get("latents", latents)

        images = latents
        if output_type != "latent":
            latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            images = self.vae.decode(latents, return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _numbers_of_names(id2label: dict[str, str]) -> dict[str, list[int]]:
    """Return the class numbers of every name in lower case.

    A synonym that classes share belongs to the one that has it for its first name, if one has.
    """
    first: dict[str, list[int]] = {}
    every: dict[str, list[int]] = {}
    for number, names in id2label.items():
        for i, name in enumerate(names.split(",")):
            key = name.strip().casefold()
            every.setdefault(key, []).append(int(number))
            if i == 0:
                first.setdefault(key, []).append(int(number))
    return every | first
