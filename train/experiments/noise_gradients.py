"""Why the gradient of multistep score distillation is enough: one x_T optimised with it and with the full gradient, and the Jacobian.

    python train/experiments/noise_gradients.py --backbone assets/emoji --output noise_gradients.json --plot noise_gradients.png

Optimisation (paper, figures 6, 35 and 36): x_T of held-out prompts is moved, by Adam, so that unguided sampling in N steps
meets the guided image of the same x_T.  Told are the loss, the norm of the gradient, and for the full gradient its norm at x_t
after every step.  Jacobian (appendix B.3, figures 31 and 32): of the noise prediction by x_t along unguided sampling; the mean
size of its diagonal and off-diagonal entries, of rows drawn at random.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from tqdm import tqdm

from noiserefine import draw_noise
from noiserefine.models.loading import load_pipeline
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from train.evaluate import FIRST_SEED, held_out_prompts
from train.experiments.denoiser_lora import Trajectories
from train.train_refiner import atomic, latents_from


def sample_with_gradient(
    pipe: DiffusionPipeline, x_T: torch.Tensor, embeds: dict[str, Any], steps: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x0 and every x_t on the way, (B, C, h, w), unguided, with the graph of all steps: the pipeline's call without its torch.no_grad."""
    passed: list[torch.Tensor] = []

    def keep(pipe, step, timestep, values):
        values["latents"].retain_grad()
        passed.append(values["latents"])
        return values

    call = type(pipe).__call__.__wrapped__  # type: ignore[attr-defined]  # which torch.no_grad leaves there
    x0 = call(
        pipe,
        latents=x_T,
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=keep,
        **embeds,
    ).images
    return x0, passed


def optimise(
    pipe: DiffusionPipeline,
    x_T: torch.Tensor,
    target: torch.Tensor,
    embeds: dict[str, Any],
    args: argparse.Namespace,
    full: bool,
) -> dict:
    """The loss, (iterations, B), the gradient's norm, (iterations, B), and, for the full one, its norm at every x_t, (iterations, steps)."""
    x = x_T.clone().requires_grad_(True)
    optimizer, gain = torch.optim.Adam([x], lr=args.lr), sampler_gain(pipe.scheduler, args.steps)
    losses, norms, norms_at = [], [], []
    for _ in tqdm(range(args.iterations), desc="full gradient" if full else "MSD"):
        if full:
            x0, passed = sample_with_gradient(pipe, x, embeds, args.steps)
            loss = F.mse_loss(x0, target)
        else:
            x0 = latents_from(pipe, x, embeds, args.steps, 0)
            loss = msd_loss(x0, x, target, gain)
        optimizer.zero_grad()
        loss.backward()
        assert x.grad is not None
        losses.append((x0.detach() - target).pow(2).mean((1, 2, 3)).tolist())
        norms.append((x.grad * len(x)).flatten(1).norm(dim=1).tolist())
        if full:
            norms_at.append(
                [
                    (value.grad * len(x)).flatten(1).norm(dim=1).mean().item()
                    for value in passed
                    if value.grad is not None
                ]
            )
        optimizer.step()
    return {"loss": losses, "gradient_norm": norms, "gradient_norm_at_x_t": norms_at}


def jacobian(
    pipe: DiffusionPipeline, x_T: torch.Tensor, embeds: dict[str, Any], args: argparse.Namespace
) -> list[dict]:
    """For every timestep of sampling the mean absolute diagonal and off-diagonal entry of d epsilon / d x_t, over images and rows."""
    path, visited = Trajectories(pipe), []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, inputs: visited.append((inputs[0].detach(), int(inputs[1])))
    )
    latents_from(pipe, x_T, embeds, args.steps, 0)
    handle.remove()
    generator, told = torch.Generator().manual_seed(0), []
    for x_t, t in tqdm(visited, desc="Jacobian"):
        diagonal, others = [], []
        for i in range(len(x_t)):
            rows = torch.randperm(x_t[i].numel(), generator=generator)[: args.rows]
            x = x_t[i : i + 1].repeat(len(rows), 1, 1, 1).requires_grad_(True)
            times = torch.full((len(rows),), t, device=x.device)
            text = embeds["prompt_embeds"][i : i + 1].expand(len(rows), -1, -1)
            noise = path.x0_and_noise(times, x, pipe.unet(x, times, text).sample)[1]
            (gradient,) = torch.autograd.grad(
                noise.flatten(1)[torch.arange(len(rows)), rows].sum(), x
            )
            sizes = gradient.flatten(1).abs()
            on = sizes[torch.arange(len(rows)), rows]
            diagonal.append(on.mean().item())
            others.append(((sizes.sum() - on.sum()) / (sizes.numel() - len(rows))).item())
        told.append(
            {"t": t, "diagonal": float(np.mean(diagonal)), "off_diagonal": float(np.mean(others))}
        )
    return told


def plot(result: dict, path: Path) -> None:
    figure = Figure(figsize=(17, 3.6), layout="constrained", dpi=110)
    axes = figure.subplots(1, 4)
    for name, colour in (("msd", "tab:blue"), ("full", "tab:orange")):
        for axis, what in zip(axes, ("loss", "gradient_norm")):
            values = np.array(result[name][what])
            axis.semilogy(values, color=colour, alpha=0.25, linewidth=0.8)
            axis.semilogy(
                np.exp(np.log(values).mean(1)),
                color=colour,
                label={"msd": "MSD", "full": "full gradient"}[name],
            )
            axis.set(title=what.replace("_", " "), xlabel="iteration")
    axes[0].legend()
    at = np.array(result["full"]["gradient_norm_at_x_t"])
    for i in np.linspace(0, len(at) - 1, 6).astype(int):
        axes[2].semilogy(range(1, at.shape[1] + 1), at[i], label=f"iteration {i + 1}")
    axes[2].set(title="full gradient: its norm at x_t", xlabel="sampling steps done")
    axes[2].legend(fontsize=7)
    for name, colour in (("diagonal", "tab:blue"), ("off_diagonal", "tab:gray")):
        axes[3].semilogy(
            [row["t"] for row in result["jacobian"]],
            [row[name] for row in result["jacobian"]],
            "o-",
            color=colour,
            label=name.replace("_", " "),
        )
    axes[3].set(title="Jacobian of the noise prediction", xlabel="t")
    axes[3].legend()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="assets/emoji")
    parser.add_argument("--n", type=int, default=8, help="prompts, each with one x_T")
    parser.add_argument("--steps", type=int, default=10, help="N, of the unguided sampling")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument(
        "--lr", type=float, default=0.02, help="of Adam, the same for both gradients"
    )
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    parser.add_argument(
        "--rows", type=int, default=128, help="of the Jacobian, for each image and timestep"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--plot", type=Path, help="PNG file of the curves")
    args = parser.parse_args(arguments)
    pipe = with_sampler(load_pipeline(args.backbone, dtype=torch.float32), "DDIM")
    pipe.unet.requires_grad_(False)
    embeds: dict[str, Any] = encode_prompt(pipe, held_out_prompts(args.n))
    x_T = draw_noise(pipe, FIRST_SEED, args.n).to(pipe.device)
    target = latents_from(pipe, x_T, embeds, 20, 0, guidance_scale=args.guidance_scale)
    result: dict[str, Any] = {
        name: optimise(pipe, x_T, target, embeds, args, full=name == "full")
        for name in ("msd", "full")
    }
    result |= {
        "n": args.n,
        "first_seed": FIRST_SEED,
        "steps": args.steps,
        "lr": args.lr,
        "jacobian": jacobian(
            pipe, x_T[:4], {name: value[:4] for name, value in embeds.items()}, args
        ),
    }
    if args.plot:
        plot(result, args.plot)
    with atomic(args.output) as part:
        part.write_text(json.dumps(result) + "\n")
    print(
        "| gradient | loss at the start | at the end | largest gradient norm / first |\n|---|---|---|---|"
    )
    for name in ("msd", "full"):
        loss, norm = np.array(result[name]["loss"]), np.array(result[name]["gradient_norm"])
        print(
            f"| {name} | {loss[0].mean():.4f} | {loss[-1].mean():.4f} | {(norm.max(0) / norm[0]).mean():.1f} |"
        )
    print("\n| t | mean size of a diagonal entry | of another entry |\n|---|---|---|")
    for row in result["jacobian"]:
        print(f"| {row['t']} | {row['diagonal']:.4f} | {row['off_diagonal']:.5f} |")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
