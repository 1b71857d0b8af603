"""LoRAs that change the denoising network itself, trained on the guided images of a refiner's run.

    python train/experiments/denoiser_lora.py --loss guidance --targets runs/refiner-emoji --evaluations 94208 --output_dir runs/guidance-distilled
    python train/experiments/denoiser_lora.py --loss images --targets runs/refiner-emoji --evaluations 94208 --output_dir runs/fine-tuned
    python train/experiments/denoiser_lora.py --loss consistency --targets runs/refiner-emoji --steps 500 --output_dir runs/few-step

guidance     guidance distillation (Meng et al. 2023, first stage; table 2): unguided, the network predicts what it predicted guided
images       fine-tuning on guided images (appendix A.12, table 12): the loss of diffusion models
consistency  consistency distillation (Luo et al. 2023), guided: every point of a trajectory predicts its end, for one to four steps

The noisy latents are guided images with noise, of the run's own prompts, so no image data are needed here either.  The result
is a plain LoRA, for evaluate.py's --lora and for the page.  The same command goes on where it stopped.
"""

import argparse
import json
import sys
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
from noiserefine.samplers import make_scheduler
from train.emoji.fit import fit
from train.experiments.networks import Raw

EVALUATIONS = {
    "guidance": 4,
    "images": 2,
    "consistency": 5,
}  # of the network for an item of a batch, as appendix A.7 counts: a backward pass is one


def read_targets(folder: Path) -> tuple[torch.Tensor, list[str], float]:
    """The guided latents, (M, C, h, w), of a run of train_refiner.py, their prompts and guidance scale.

    Raises FileNotFoundError where there are none, and ValueError for targets that are not guided by one CFG scale alone.
    """
    files = sorted((folder / "targets").glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no targets: it is not the --output_dir of a run of train/train_refiner.py."
        )
    run = json.loads((folder / "config.json").read_text())
    if run["pag_scale"] or run["guidance_scale_range"] or run["keep_top"]:
        raise ValueError(
            f"The targets in {folder} have PAG, a range of scales or a choice by score; these comparisons take targets of one CFG scale."
        )
    latents: list[torch.Tensor] = []
    prompts: list[str] = []
    for path in files:
        with safe_open(path, "pt") as file:
            latents.append(file.get_tensor("x0").float())
            prompts += json.loads(file.metadata()["prompts"])
    return torch.cat(latents), prompts, run["guidance_scale"]


class Trajectories:
    """Noisy latents of a pipeline's schedule, and what a prediction at t says of them: x0 and noise."""

    def __init__(self, pipe: DiffusionPipeline):
        scheduler = make_scheduler("DDIM", pipe)
        self.alphas = scheduler.alphas_cumprod.to(pipe.device)
        self.predicts_v = scheduler.config.prediction_type == "v_prediction"
        self.last = scheduler.config.num_train_timesteps - 1

    def signal_and_noise(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of x0 and of noise in x_t, (B, 1, 1, 1); t = -1 is the end, x0 itself."""
        alpha = torch.where(t < 0, 1.0, self.alphas[t.clamp(min=0)])[:, None, None, None]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def at(self, t: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        signal, deviation = self.signal_and_noise(t)
        return signal * x0 + deviation * noise

    def truth(self, t: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the network should predict at t."""
        signal, deviation = self.signal_and_noise(t)
        return signal * noise - deviation * x0 if self.predicts_v else noise

    def x0_and_noise(
        self, t: torch.Tensor, x: torch.Tensor, prediction: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        signal, deviation = self.signal_and_noise(t)
        if self.predicts_v:
            return signal * x - deviation * prediction, deviation * x + signal * prediction
        return (x - deviation * prediction) / signal, prediction


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", choices=EVALUATIONS, required=True)
    parser.add_argument(
        "--backbone",
        default="assets/emoji",
        help="hub id or folder of a pipeline with one text encoder",
    )
    parser.add_argument(
        "--targets",
        type=Path,
        required=True,
        help="--output_dir of the refiner's run whose guided images to train on",
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, help="of the optimiser; or --evaluations")
    parser.add_argument(
        "--evaluations",
        type=int,
        help="of the network, the budget to spend: the number of steps follows",
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--grid", type=int, default=20, help="consistency: points of a trajectory")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(arguments)
    if (args.steps is None) == (args.evaluations is None):
        parser.error("One of --steps and --evaluations says how long to train.")
    steps = args.steps or args.evaluations // (EVALUATIONS[args.loss] * args.batch_size)
    if steps < 1:
        parser.error(
            f"That is no step: one takes {EVALUATIONS[args.loss] * args.batch_size} evaluations."
        )
    pipe = load_pipeline(args.backbone, dtype=torch.float32)
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise ValueError(
            f"{args.backbone} has two text encoders; these comparisons are written for models with one."
        )
    latents, prompts, guidance_scale = read_targets(args.targets)
    settings = {name: str(value) for name, value in vars(args).items() if name != "output_dir"} | {
        "guidance_scale": guidance_scale,
        "unet": signature(pipe.unet),
    }
    config = args.output_dir / "config.json"
    if config.exists() and json.loads(config.read_text()) != settings:
        raise ValueError(
            f"{args.output_dir} holds another run: give the same options, or another --output_dir."
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(settings, indent=2) + "\n")
    torch.manual_seed(0)
    teacher, network = (
        pipe.unet.requires_grad_(False),
        Raw.create(pipe, args.rank),
    )  # the same weights, without and with a LoRA
    student, path = network.network, Trajectories(pipe)
    if args.loss == "consistency" and not path.predicts_v:
        raise ValueError(
            "The loss consistency is written for models that predict v: where ε is predicted, x0 is lost in the noise at t = T."
        )
    cast_training_params(student)
    span = (path.last + 1) // args.grid

    def guided(
        x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, no_text: torch.Tensor
    ) -> torch.Tensor:
        without, with_text = teacher(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([no_text, text])
        ).sample.chunk(2)
        return without + guidance_scale * (with_text - without)

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(latents), (args.batch_size,), generator=generator)
        x0 = latents[chosen].to(pipe.device)
        noise = torch.randn(x0.shape, generator=generator).to(pipe.device)
        embeds = encode_prompt(pipe, [prompts[i] for i in chosen.tolist()])
        text, no_text = embeds["prompt_embeds"], embeds["negative_prompt_embeds"]
        if args.loss == "consistency":
            t = (path.last - span * torch.randint(args.grid, (len(x0),), generator=generator)).to(
                pipe.device
            )
        else:
            t = torch.randint(path.last + 1, (len(x0),), generator=generator).to(pipe.device)
        x = path.at(t, x0, noise)
        prediction = student(x, t, text).sample
        if args.loss == "images":
            return F.mse_loss(prediction, path.truth(t, x0, noise))
        with torch.no_grad():
            target = guided(x, t, text, no_text)
            if args.loss == "consistency":
                earlier = (
                    t - span
                )  # a step of DDIM towards the end, by the teacher; what the student says there is the target
                end, direction = path.x0_and_noise(t, x, target)
                x_s = path.at(earlier, end, direction)
                there = path.x0_and_noise(
                    earlier.clamp(min=0), x_s, student(x_s, earlier.clamp(min=0), text).sample
                )[0]
                end = torch.where((earlier < 0)[:, None, None, None], end, there)
                # As v: in the units of x0 small t would hardly count, and what larger t learn is built on them.
                signal, deviation = path.signal_and_noise(t)
                target = (signal * x - end) / deviation
        return F.mse_loss(prediction, target)

    fit(student, loss, args.output_dir / "checkpoint.pt", steps=steps, lr=args.lr, save_every=200)
    save_lora(pipe, student.half(), args.output_dir / WEIGHTS_NAME)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
