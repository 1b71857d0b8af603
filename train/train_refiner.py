# /// script
# requires-python = ">=3.11"
# dependencies = ["noiserefine[train]"]
#
# [tool.uv.sources]
# noiserefine = { path = "..", editable = true }
# ///
"""Train a refiner: prompts -> guided targets -> multistep score distillation -> a LoRA.

    python train/train_refiner.py --preset emoji --output_dir runs/refiner-emoji
    accelerate launch train/train_refiner.py --preset sd21 --prompts prompts.txt \\
        --output_dir runs/refiner-sd21

Everything is kept in --output_dir. Run the same command again to continue after an interruption:

    config.json     the options            targets/      guided latents x0, seeds and prompts
    stats.jsonl     a line for each step   validation/   pictures of held-out prompts
    tensorboard/    the same, as curves    refiner.json, pytorch_lora_weights.safetensors

All randomness is drawn from (--seed, step), so an interrupted run ends where an uninterrupted one
does. Section and equation numbers are the paper's.
"""

import importlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from torch import nn

from noiserefine import Refiner
from noiserefine.denoiser import denoiser
from noiserefine.guidance import check_guidance, sample_latents
from noiserefine.guiders import GUIDERS
from noiserefine.lora import store_in_8_bits
from noiserefine.models.loading import load_pipeline
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import image_size
from noiserefine.samplers import samplers_of, with_sampler
from train.captions import read_prompts
from train.common import WAIT, computes_on_cpu, load_named, run_script
from train.options import DTYPES, Options, describe, parse, plan
from train.placement import taking_turns
from train.run import Checkpoint, Run, checkpointing_problem, read_log, stage_advice
from train.settings import open_run, settings_of
from train.targets import Batch, Targets
from train.tools.share import push
from train.validation import Validation

RECORDED = (  # in refiner.json
    *("network", "layers", "loss", "guidance_scale", "guidance_scale_range", "pag_scale"),
    *("teacher", "target_steps", "sampler", "steps", "num_targets", "epochs"),
    *("mixed_precision", "fp8", "height", "width", "prompts", "num_validation"),
)


class MSD:
    """Multistep score distillation, the paper's loss (equation 4)."""

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        self.pipe, self.steps = with_sampler(pipe, options.sampler), options.steps
        self.gain = sampler_gain(self.pipe.scheduler, self.steps)

    def __call__(self, x_hat: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the distance of the unguided image from x_hat, (B, C, h, w), to the guided one."""
        x0 = sample_latents(self.pipe, x_hat, batch.embeds, self.steps, seed=batch.seed)  # no grad
        return msd_loss(x0.float(), x_hat, batch.x0_guide, self.gain)


def train(
    accelerator: Accelerator,
    targets: Targets,
    refiner: Refiner,
    loss_of: MSD,
    validation: Validation | None,
) -> None:
    """Minimise the loss over the refiner's parameters, from the last checkpoint on.

    Raise ArithmeticError if the loss stays not finite, KeyboardInterrupt when asked to stop.
    """
    options = targets.options
    total_steps, _ = plan(options, accelerator.num_processes)
    parameters = [p for p in refiner.network.parameters() if p.requires_grad]
    optimizer = _adamw(options)(parameters, lr=options.lr, weight_decay=options.weight_decay)
    warmup = {"num_warmup_steps": options.warmup_steps, "num_training_steps": total_steps}
    schedule = get_scheduler(options.lr_schedule, optimizer, **warmup)
    correction, optimizer = accelerator.prepare(Correction(refiner), optimizer)
    if options.fp8:
        store_in_8_bits(denoiser(targets.pipe), refiner.network)
    parts = {"optimizer": optimizer, "schedule": schedule, "scaler": accelerator.scaler}
    checkpoint = Checkpoint(Path(options.output_dir) / "checkpoint.pt", parameters, **parts)
    validate = partial(validation, refiner) if validation else None
    run = Run(options, accelerator, total_steps, checkpoint, validate)

    for step in run.steps():
        losses = []
        for batch in targets.batches(step, accelerator):  # prompts, x_T and guided x0
            with accelerator.accumulate(correction):
                x_hat = batch.x_T + correction(batch.x_T, batch.embeds, batch.guidance_scale)
                loss = loss_of(x_hat, batch)
                accelerator.backward(loss)
            losses.append(loss.detach())
        norm = accelerator.clip_grad_norm_(parameters, options.max_grad_norm)
        if run.accept(torch.stack(losses).mean(), norm, schedule.get_last_lr()[0]):
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()


class Correction(nn.Module):
    """The refining pass as a module, for accelerate to wrap."""

    def __init__(self, refiner: Refiner):
        super().__init__()
        self.network, self.correction = refiner.network, refiner.correction

    def forward(self, *args) -> torch.Tensor:
        """Return what strength 1 adds to x_T, (B, C, h, w)."""
        return self.correction(*args)


def main(arguments: list[str] | None = None) -> None:
    """Train a refiner as the command line says, or continue."""
    options = parse(arguments, description=__doc__.split("\n\n")[0])
    if options.dry_run:
        print(describe(options, int(os.environ.get("WORLD_SIZE", "1"))))
        return
    with stage_advice(options, "loading"):
        run(options)


def run(options: Options) -> None:
    """Make the targets and train, or continue."""
    accelerator = _accelerator(options)
    set_seed(options.seed)

    # The pipeline, prompts and loss: whatever cannot work is refused before the expensive part.
    dtype = DTYPES[options.mixed_precision]
    pipe = load_pipeline(options.backbone, accelerator.device, dtype, place=taking_turns)
    options.sampler = options.sampler or samplers_of(pipe)[0]
    guider = GUIDERS[options.teacher](options.guidance_scale)
    check_guidance(pipe, options.guidance_scale, options.pag_scale, guider)
    height, width = image_size(pipe, options.height, options.width)
    vae = getattr(pipe, "vae", None)
    if vae is not None and vae.config.get("force_upcast"):
        vae.float()  # it overflows in half precision; used for pictures only
    prompts = read_prompts(options.prompts, pipe)
    held_out = (
        read_prompts(options.validation_prompts, pipe) if options.validation_prompts else None
    )
    if held_out:
        options.num_validation = min(options.num_validation, len(held_out))
    loss_of = (MSD if options.loss == "msd" else load_named("loss", options.loss))(pipe, options)
    targets = Targets(options, pipe, prompts, getattr(loss_of, "extra_tensors", None))
    refiner = _create_refiner(options, pipe)
    signature = refiner.config.base_signature
    facts = {"height": height, "width": width, "backbone_signature": signature}
    settings = settings_of(options, accelerator.num_processes, prompts, **facts)
    open_run(Path(options.output_dir), settings, accelerator.is_main_process)
    if accelerator.is_main_process:
        print(describe(options, accelerator.num_processes, pipe.scheduler))

    # A first sheet, the targets, then training.
    accelerator.wait_for_everyone()
    if options.compile:
        denoiser(pipe).compile()
    validation = None
    with stage_advice(options, "sampling"):
        if held_out and accelerator.is_main_process:
            validation = Validation(options, pipe, held_out, accelerator)
            validation(refiner, step=0)
        targets.make(accelerator)
    with stage_advice(options, "training", refiner.network):
        train(accelerator, targets, refiner, loss_of, validation)
    if accelerator.is_main_process:
        _save(refiner, targets, settings, accelerator.num_processes)


def _save(refiner: Refiner, targets: Targets, settings: dict[str, Any], processes: int) -> None:
    """Write the refiner with what it was trained towards and what was measured of it."""
    folder, log = Path(settings["output_dir"]), read_log(Path(settings["output_dir"]))
    refiner.config.training = {name: settings[name] for name in RECORDED}
    refiner.config.training["optimizer_steps"] = len(log)
    refiner.config.results = results(log, targets.seconds(), processes)
    refiner.save_pretrained(folder)
    print(f"Saved the refiner to {folder}: {refiner.config.results}")
    if settings["push_to_hub"]:
        print(f"Published at {push(folder, settings['push_to_hub'])}")


def results(
    log: list[dict[str, float]], seconds_of_targets: float, processes: int
) -> dict[str, float]:
    """Return the last validation's figures, and the seconds of all devices added up."""
    validation = {name: value for name, value in log[-1].items() if name.startswith("validation")}
    return validation | {
        "seconds_of_targets": seconds_of_targets,
        "seconds_of_steps": processes * sum(line["seconds"] for line in log),
        "steps_skipped": sum(line.get("skipped", 0) for line in log),
    }


def _accelerator(options: Options) -> Accelerator:
    if options.mixed_precision == "fp16" and computes_on_cpu():
        raise ValueError("--mixed_precision fp16 needs a GPU: on a CPU choose bf16 or no.")
    return Accelerator(
        cpu=computes_on_cpu(),
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )


def _adamw(options: Options) -> Any:
    if options.optimizer == "adamw8bit":
        return importlib.import_module("bitsandbytes").optim.AdamW8bit
    return torch.optim.AdamW


def _create_refiner(options: Options, pipe: DiffusionPipeline) -> Refiner:
    network = Refiner if options.network == "lora" else load_named("network", options.network)
    refiner = network.create(
        pipe,
        options.rank,
        guidance_scale_range=options.guidance_scale_range,
        layers=options.layers,
    )
    denoiser(pipe).requires_grad_(False)
    cast_training_params(refiner.network)
    if options.gradient_checkpointing:
        _checkpoint_gradients(refiner.network)
    return refiner


def _checkpoint_gradients(network: Any) -> None:
    """Let the backward pass recompute activations. Raise ValueError where diffusers cannot."""
    if problem := checkpointing_problem(network):
        raise ValueError(
            f"{problem}: give --gradient_checkpointing False, and a smaller --batch_size if memory "
            "is short."
        )
    network.enable_gradient_checkpointing()


if __name__ == "__main__":
    run_script(main)
