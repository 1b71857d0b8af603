"""Train LoRAs that change the denoising network itself, on the guided images of a refiner's run.

    python train/experiments/denoiser_lora.py --loss guidance --targets runs/refiner-emoji \\
        --evaluations 94208 --output_dir runs/guidance-distilled
    python train/experiments/denoiser_lora.py --loss images --targets runs/refiner-emoji \\
        --evaluations 94208 --output_dir runs/fine-tuned
    python train/experiments/denoiser_lora.py --loss consistency --targets runs/refiner-emoji \\
        --steps 500 --output_dir runs/few-step

guidance     guidance distillation (Meng et al. 2023, first stage; table 2): unguided, the network
             predicts what it predicted guided
images       fine-tuning on guided images (appendix A.12, table 12): the loss of diffusion models
consistency  consistency distillation (Luo et al. 2023), guided: every point of a trajectory
             predicts its end, for one to four steps

The noisy latents are guided images with noise, of the run's own prompts, so no image data are
needed. The result is a plain LoRA, for evaluate.py's --lora and for the page. Run the same command
again to continue.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from safetensors import safe_open

from noiserefine.checkpoint import WEIGHTS_NAME, signature
from noiserefine.lora import save_lora
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt
from train.common import argument_parser, check_recorded, run_script, write_json
from train.emoji.fit import Settings, fit
from train.experiments.networks import Raw, check_unet
from train.experiments.trajectories import Trajectories
from train.settings import SETTINGS, read_settings

# Network evaluations for an item of a batch, as appendix A.7 counts: a backward pass is one.
EVALUATIONS = {"guidance": 4, "images": 2, "consistency": 5}


def read_targets(folder: Path) -> tuple[torch.Tensor, list[str], float]:
    """Return the guided latents of a trainer's run, (M, C, h, w), their prompts and scale.

    Raise FileNotFoundError if there are none, and ValueError unless one CFG scale guided them all.
    """
    files = sorted((folder / "targets").glob("*.safetensors"))
    if not files or not (folder / SETTINGS).is_file():
        raise FileNotFoundError(
            f"{folder} holds no targets: it is not the --output_dir of a run of train_refiner.py."
        )
    run = read_settings(folder)
    plain_cfg = run.get("teacher", "cfg") == "cfg" and not run["pag_scale"]
    if not plain_cfg or run["guidance_scale_range"] or run["keep_top"]:
        raise ValueError(
            f"The targets in {folder} have PAG, another --teacher, a range of scales or a choice "
            "by score; these comparisons take targets of one CFG scale."
        )
    latents: list[torch.Tensor] = []
    prompts: list[str] = []
    for path in files:
        with safe_open(path, "pt") as file:
            latents.append(file.get_tensor("x0").float())
            prompts += json.loads(file.metadata()["prompts"])
    return torch.cat(latents), prompts, run["guidance_scale"]


class Distillation:
    """The three losses of a student on its teacher's guided images."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        student: torch.nn.Module,
        targets: tuple[torch.Tensor, list[str], float],
        args: argparse.Namespace,
    ):
        self.pipe, self.teacher, self.student = pipe, pipe.unet, student
        self.latents, self.prompts, self.guidance_scale = targets
        self.loss, self.batch_size, self.path = args.loss, args.batch_size, Trajectories(pipe)
        self.grid, self.span = args.grid, (self.path.last + 1) // args.grid
        if self.loss == "consistency" and not self.path.predicts_v:
            raise ValueError(
                "The loss consistency is written for models that predict v: where ε is predicted, "
                "x0 is lost in the noise at t = T."
            )

    def __call__(self, generator: torch.Generator) -> torch.Tensor:
        """Return the loss of a batch drawn from the generator."""
        # Noisy latents x_t of random targets.
        chosen = torch.randint(len(self.latents), (self.batch_size,), generator=generator)
        x0 = self.latents[chosen].to(self.pipe.device)
        noise = torch.randn(x0.shape, generator=generator).to(self.pipe.device)
        t = self._timesteps(generator).to(self.pipe.device)
        x = self.path.at(t, x0, noise)

        prompts = [self.prompts[i] for i in chosen.tolist()]
        embeds = encode_prompt(self.pipe, prompts, guided=self.loss != "images")
        prediction = self.student(x, t, embeds["prompt_embeds"]).sample
        if self.loss == "images":
            return F.mse_loss(prediction, self.path.truth(t, x0, noise))
        with torch.no_grad():
            target = self._guided(x, t, embeds)
            if self.loss == "consistency":
                target = self._consistent(x, t, embeds, target)
        return F.mse_loss(prediction, target)

    def _timesteps(self, generator: torch.Generator) -> torch.Tensor:
        if self.loss == "consistency":
            steps = torch.randint(self.grid, (self.batch_size,), generator=generator)
            return self.path.last - self.span * steps
        return torch.randint(self.path.last + 1, (self.batch_size,), generator=generator)

    def _guided(self, x: torch.Tensor, t: torch.Tensor, embeds: dict) -> torch.Tensor:
        text = torch.cat([embeds["negative_prompt_embeds"], embeds["prompt_embeds"]])
        both = self.teacher(torch.cat([x, x]), torch.cat([t, t]), text).sample
        unconditional, conditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _consistent(
        self, x: torch.Tensor, t: torch.Tensor, embeds: dict, guided: torch.Tensor
    ) -> torch.Tensor:
        """Return the student's prediction one DDIM step of the teacher further, as v at t."""
        earlier = t - self.span
        end, direction = self.path.x0_and_noise(t, x, guided)
        x_s, s = self.path.at(earlier, end, direction), earlier.clamp(min=0)
        prediction = self.student(x_s, s, embeds["prompt_embeds"]).sample
        student_end = self.path.x0_and_noise(s, x_s, prediction)[0]
        end = torch.where((earlier < 0)[:, None, None, None], end, student_end)
        # In the units of x0 small t would hardly count, and what larger t learn is built on them.
        signal, deviation = self.path.signal_and_noise(t)
        return (signal * x - end) / deviation


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options, with the number of steps; end the process for values that cannot work."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--loss", choices=EVALUATIONS, required=True)
    add("--backbone", default="assets/emoji", help="Stable Diffusion with one text encoder")
    add("--targets", type=Path, required=True, help="--output_dir of a refiner's run")
    add("--rank", type=int, default=32)
    add("--steps", type=int, help="steps of the optimiser; or give --evaluations")
    add("--evaluations", type=int, help="network evaluations to spend; the steps follow")
    add("--batch_size", type=int, default=32)
    add("--lr", type=float, default=1e-3)
    add("--grid", type=int, default=20, help="consistency: points of a trajectory")
    add("--output_dir", type=Path, required=True)
    args = parser.parse_args(arguments)
    if (args.steps is None) == (args.evaluations is None):
        parser.error("Give one of --steps and --evaluations.")
    step_cost = EVALUATIONS[args.loss] * args.batch_size
    args.total_steps = args.steps or args.evaluations // step_cost
    if args.total_steps < 1:
        parser.error(f"--evaluations is less than a step, which takes {step_cost}.")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train the LoRA that the command line asks for, or continue."""
    args = parse(arguments)
    pipe = load_pipeline(args.backbone, dtype=torch.float32)
    check_unet(pipe, "A LoRA on the denoiser", prompt_alone=True)
    targets = read_targets(args.targets)
    given = {name: str(value) for name, value in vars(args).items() if name != "output_dir"}
    settings = given | {"guidance_scale": targets[2], "unet": signature(pipe.unet)}
    check_recorded(args.output_dir / SETTINGS, settings)
    torch.manual_seed(0)
    pipe.unet.requires_grad_(False)
    student = Raw.create(pipe, args.rank).network  # the same weights, with a LoRA
    distillation = Distillation(pipe, student, targets, args)
    write_json(args.output_dir / SETTINGS, settings)
    cast_training_params(student)
    checkpoint = args.output_dir / "checkpoint.pt"
    fit(
        student,
        distillation,
        checkpoint,
        Settings(lr=args.lr, steps=args.total_steps, save_every=200),
    )
    save_lora(pipe, student.half(), args.output_dir / WEIGHTS_NAME)


if __name__ == "__main__":
    run_script(main)
