"""Validation while training: how near unguided sampling comes to guided sampling."""

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from noiserefine import Refiner, draw_noise
from noiserefine.guidance import sample_latents
from noiserefine.guiders import GUIDERS
from noiserefine.latents import decode
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from train.options import Options
from train.placement import decoding_parts, encoding, on_device
from train.run import stage_advice

FIRST_SEED = 2**31  # beyond every target's
SHOWN = 8  # images of each arm on a sheet


class Validation:
    """Held-out prompts with fixed seeds, sampled unguided, guided and from refined noise."""

    def __init__(
        self,
        options: Options,
        pipe: DiffusionPipeline,
        prompts: list[str],
        accelerator: Accelerator,
    ):
        self.options, self.autocast = options, accelerator.autocast
        self.pipe = with_sampler(pipe, options.sampler)
        self.folder = Path(options.output_dir) / "validation"
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(prompts), generator=generator)[: options.num_validation]
        calls = order.split(options.target_batch_size)
        with stage_advice(options, "encoding"), encoding(pipe, accelerator.device):
            self.embeds = [encode_prompt(pipe, [prompts[i] for i in call]) for call in calls]
            self.empty_prompt = encode_prompt(pipe, "", guided=False)  # to decode with
        seed, size = FIRST_SEED + options.seed, (options.height, options.width)
        x_T = draw_noise(pipe, seed, len(order), *size).to(accelerator.device)
        self.x_T = x_T.split(options.target_batch_size)
        self.x0 = {
            "gaussian": self._sample(self.x_T, options.steps),
            "guided": self._sample(
                self.x_T,
                options.target_steps,
                guidance_scale=options.guidance_scale,
                pag_scale=options.pag_scale,
                guider=GUIDERS[options.teacher](options.guidance_scale),
            ),
        }

    def __call__(self, refiner: Refiner, step: int) -> dict[str, float]:
        """Return both unguided arms' mean squared distance to the guided latents.

        validation_percent is the share of the Gaussian arm's distance that refining takes away.
        Write validation/STEP.png with a row each of unguided, guided and refined images.
        """
        with stage_advice(self.options, "sampling"):
            return self._measure(refiner, step)

    def _measure(self, refiner: Refiner, step: int) -> dict[str, float]:
        scale = refiner.scale_input(self.options.guidance_scale)
        with self.autocast():  # as in training: the LoRA is in float32, its base is not
            x_hat = [
                refiner.refine(x_T, embeds, guidance_scale=scale)
                for x_T, embeds in zip(self.x_T, self.embeds, strict=True)
            ]
        arms = self.x0 | {"refined": self._sample(x_hat, self.options.steps)}
        if getattr(self.pipe, "vae", None) is not None:
            self._write_sheet(arms, step)
        gaussian, refined = (
            (arms[name] - arms["guided"]).pow(2).mean().item() for name in ("gaussian", "refined")
        )
        return {
            "validation_gaussian": gaussian,
            "validation_refined": refined,
            "validation_percent": 100 * (1 - refined / gaussian),
        }

    def _write_sheet(self, arms: dict[str, torch.Tensor], step: int) -> None:
        with on_device(decoding_parts(self.pipe), self.x_T[0].device):
            images = [
                image
                for x0 in arms.values()
                for image in decode(self.pipe, x0[:SHOWN], self.empty_prompt)
            ]
        self.folder.mkdir(exist_ok=True)
        sheet = make_image_grid(images, len(arms), len(images) // len(arms))
        sheet.save(self.folder / f"{step:07d}.png")

    def _sample(self, latents: Iterable[torch.Tensor], steps: int, **guidance) -> torch.Tensor:
        seed = self.options.seed
        made = [
            sample_latents(self.pipe, x, embeds, steps, seed=seed, **guidance).float()
            for x, embeds in zip(latents, self.embeds, strict=True)
        ]
        return torch.cat(made)
