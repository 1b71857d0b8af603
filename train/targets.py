"""Guided targets on disk, and the batches that training takes of them."""

import bisect
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from noiserefine.guidance import sample_latents
from noiserefine.guiders import GUIDERS
from noiserefine.latents import decode
from noiserefine.noise import draw_noise, encode_prompt, encoding_for
from noiserefine.samplers import with_sampler
from train.common import atomic, load_named
from train.embeds import Embeds, moved
from train.options import Options
from train.placement import decoding_parts, encoding, encoding_parts, move, on_device
from train.run import stage_advice

GOLDEN_RATIO = 0.6180339887498949  # its multiples, modulo 1, are spread evenly
ENCODED_CALLS = 16  # whose prompts are encoded at once
EPOCH_STRIDE = 1_000_003  # between the seeds of two runs' epochs


@dataclass
class Batch:
    """One forward's share of the targets, on its device."""

    x_T: torch.Tensor  # (B, C, h, w), Gaussian
    embeds: dict[str, Any]  # the prompts, as the pipeline takes them
    guidance_scale: torch.Tensor  # (B,), of the targets
    x0_guide: torch.Tensor  # (B, C, h, w), the guided latents from x_T
    extra: dict[str, torch.Tensor]  # what the loss stored beside them
    seed: int  # of the noise that stochastic samplers add


class Targets:
    """Guided latents of M pairs (x_T, prompt), in files of one sampling call each.

    Item i has the seed `--seed` + i and prompt i of the shuffled list.

    extra_tensors: maps (x0, embeds) to tensors, a row for each item, to store beside x0.
    """

    def __init__(
        self,
        options: Options,
        pipe: DiffusionPipeline,
        prompts: list[str],
        extra_tensors: Callable[[torch.Tensor, dict[str, Any]], dict[str, torch.Tensor]]
        | None = None,
    ):
        self.options, self.pipe, self.extra_tensors = options, pipe, extra_tensors
        self.score = load_named("score", options.score) if options.score else None
        self.folder = Path(options.targets_of or options.output_dir) / "targets"
        generator = torch.Generator().manual_seed(options.seed)
        order = itertools.cycle(torch.randperm(len(prompts), generator=generator).tolist())
        self.prompts = [prompts[i] for i in itertools.islice(order, options.num_targets)]
        self.embeds = Embeds(pipe, self.folder / "prompts")

    def make(self, accelerator: Accelerator) -> None:
        """Sample the targets that are not on disk yet, every process its share.

        Encode their prompts for training.  After this text encoders are on the device if training
        needs them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        calls = self._missing_calls()
        accelerator.wait_for_everyone()  # all processes have seen the same files
        share = calls[accelerator.process_index :: accelerator.num_processes]
        pipe, device = with_sampler(self.pipe, self.options.sampler), accelerator.device
        with stage_advice(self.options, "encoding"), encoding(pipe, device):
            self.embeds.make(self.prompts, accelerator)
            self.empty_prompt = encode_prompt(pipe, "", guided=False)  # to decode with
        hidden = not accelerator.is_local_main_process
        for indices, embeds in tqdm(
            self._encoded(share, device), "targets", len(share), disable=hidden
        ):
            began = time.perf_counter()
            tensors = self._sample(pipe, indices, embeds)
            seconds = str(time.perf_counter() - began)
            metadata = {"prompts": json.dumps(self._prompts(indices)), "seconds": seconds}
            with atomic(self.folder / f"{indices[0]:08d}.safetensors") as part:
                save_file(tensors, part, metadata)
        if not self.embeds.stored:
            move(encoding_parts(pipe), device)
        accelerator.wait_for_everyone()
        self.__dict__.pop("files", None)

    def batches(self, step: int, accelerator: Accelerator) -> Iterator[Batch]:
        """Yield this process's batches of an optimiser step: every epoch is a new shuffle."""
        size = self.options.batch_size
        processes = accelerator.num_processes
        accumulated = self.options.gradient_accumulation_steps
        for micro in range(accumulated):
            position = (step * accumulated + micro) * processes + accelerator.process_index
            items = range(position * size, (position + 1) * size)
            yield self._batch([self._item(i) for i in items], accelerator.device, position * size)

    def noise(self, indices: list[int]) -> torch.Tensor:
        """Return x_T of some items, (len(indices), C, h, w), on the CPU."""
        size = {"height": self.options.height, "width": self.options.width}
        return torch.cat([draw_noise(self.pipe, self.options.seed + i, **size) for i in indices])

    def guidance_scale(self, index: int) -> float:
        """Return an item's scale: one for each sampling call, spread evenly over the range."""
        if not self.options.guidance_scale_range:
            return self.options.guidance_scale
        low, high = self.options.guidance_scale_range
        call = index // self.options.target_batch_size
        return low + (high - low) * ((0.5 + call * GOLDEN_RATIO) % 1)

    def read(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return what is stored of some items: "x0", (len(indices), C, h, w), and extra tensors."""
        rows = []
        for index in indices:
            start = self._start(index)
            with safe_open(self.files[start], "pt") as file:
                names = set(file.keys()) - {"seeds", "scores"}
                rows.append({name: file.get_slice(name)[index - start] for name in names})
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    @cached_property
    def files(self) -> dict[int, Path]:
        """The files by the index of their first item, in order."""
        return {int(path.stem): path for path in sorted(self.folder.glob("*.safetensors"))}

    @cached_property
    def selected(self) -> list[int]:
        """The indices to train on: the `--keep_top` with the highest scores, or all."""
        if not self.options.keep_top:
            return list(range(self.options.num_targets))
        scores = []
        for path in self.files.values():
            with safe_open(path, "pt") as file:
                scores.append(file.get_tensor("scores"))
        best = torch.cat(scores)[: self.options.num_targets].topk(self.options.keep_top)
        return best.indices.sort().values.tolist()

    def seconds(self) -> float:
        """Return the time that sampling took, of all devices added up."""
        total = 0.0
        for start, path in self.files.items():
            if start < self.options.num_targets:  # the run of --targets_of may have more
                with safe_open(path, "pt") as file:
                    total += float(file.metadata()["seconds"])
        return total

    def _encoded(
        self, calls: list[list[int]], device: torch.device
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield each call's items with their encoded prompts.

        The text encoders take the denoiser's place on the device for the prompts of many calls.
        """
        for first in range(0, len(calls), ENCODED_CALLS):
            together = calls[first : first + ENCODED_CALLS]
            with stage_advice(self.options, "encoding"), encoding(self.pipe, device):
                encoded = [
                    moved(encode_prompt(self.pipe, self._prompts(c)), "cpu") for c in together
                ]
            for indices, embeds in zip(together, encoded, strict=True):
                yield indices, moved(embeds, device)

    def _prompts(self, indices: list[int]) -> list[str]:
        return [self.prompts[i] for i in indices]

    def _sample(
        self, pipe: DiffusionPipeline, indices: list[int], embeds: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        options = self.options
        x0 = sample_latents(
            pipe,
            self.noise(indices),
            embeds,
            options.target_steps,
            seed=options.seed + indices[0],
            guidance_scale=self.guidance_scale(indices[0]),
            pag_scale=options.pag_scale,
            guider=GUIDERS[options.teacher](self.guidance_scale(indices[0])),
        )
        tensors = {"x0": x0, "seeds": torch.tensor([options.seed + i for i in indices])}
        if self.extra_tensors:
            tensors |= self.extra_tensors(x0, encoding_for(embeds, len(x0)))
        if self.score:
            with on_device(decoding_parts(pipe), x0.device):
                images = decode(pipe, x0, self.empty_prompt)
            scores = [float(value) for value in self.score(images, self._prompts(indices))]
            if len(scores) != len(images) or not all(map(math.isfinite, scores)):
                raise ValueError(
                    f"--score {options.score} gave {scores} for {len(images)} images: it has to "
                    "return a finite number for each."
                )
            tensors["scores"] = torch.tensor(scores)
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def _missing_calls(self) -> list[list[int]]:
        """Return the items to sample, in calls of `--target_batch_size` with nothing between.

        Raise ValueError for a damaged file.
        """
        missing = set(range(self.options.num_targets))
        for start, path in self.files.items():
            try:
                with safe_open(path, "pt") as file:
                    missing -= set(range(start, start + file.get_slice("seeds").get_shape()[0]))
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is damaged ({error}): remove it, and the same command samples its "
                    "targets again."
                ) from error
        calls: list[list[int]] = []
        for index in sorted(missing):
            starts_call = index % self.options.target_batch_size == 0
            if starts_call or not calls or calls[-1][-1] != index - 1:
                calls.append([])
            calls[-1].append(index)
        return calls

    def _start(self, index: int) -> int:
        """Return the first item of the file that holds an item."""
        starts = list(self.files)
        return starts[bisect.bisect_right(starts, index) - 1]

    def _item(self, position: int) -> int:
        """Return the item at a position of the whole training."""
        count = len(self.selected)
        epoch, place = divmod(position, count)
        return self.selected[_shuffled(epoch, count, self.options.seed)[place]]

    def _batch(self, indices: list[int], device: torch.device, position: int) -> Batch:
        stored = {name: value.to(device).float() for name, value in self.read(indices).items()}
        return Batch(
            x_T=self.noise(indices).to(device),
            embeds=self.embeds.read(self._prompts(indices), device),
            guidance_scale=torch.tensor([self.guidance_scale(i) for i in indices]),
            x0_guide=stored.pop("x0"),
            extra=stored,
            seed=self.options.seed + position,
        )


@lru_cache(maxsize=2)  # a batch may span two epochs
def _shuffled(epoch: int, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * EPOCH_STRIDE + epoch)
    return torch.randperm(count, generator=generator).tolist()
