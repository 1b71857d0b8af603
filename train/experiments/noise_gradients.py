"""Show why MSD's gradient is enough: one x_T optimised with it and with the full gradient.

    python train/experiments/noise_gradients.py --output noise_gradients.json \\
        --plot noise_gradients.png

Optimisation (figures 6, 35 and 36): Adam moves x_T of held-out prompts so that unguided sampling in
N steps meets the guided image of the same x_T. Reports the loss, the gradient norm and, for the
full gradient, its norm at every x_t. Jacobian (appendix B.3, figures 31 and 32): of the noise
prediction by x_t along unguided sampling; reports the mean size of its diagonal and off-diagonal
entries, of rows drawn at random.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from tqdm import tqdm

from noiserefine import draw_noise
from noiserefine.guidance import sample_latents
from noiserefine.models.loading import load_pipeline
from noiserefine.models.usage import usual_guidance_scale
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from train.captions import held_out_prompts
from train.common import (
    FIRST_EVALUATION_SEED,
    argument_parser,
    markdown_table,
    run_script,
    write_json,
)
from train.experiments.trajectories import Trajectories

SAMPLING_STEPS = 20  # of the guided images
JACOBIAN_PROMPTS = 4
CURVES = 6  # iterations whose norms at x_t are plotted
TITLES = {"msd": "MSD", "full": "full gradient"}


def sample_with_gradient(
    pipe: DiffusionPipeline, x_T: torch.Tensor, embeds: dict[str, Any], steps: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return x0 and every x_t on the way, (B, C, h, w), unguided, with the graph of all steps."""
    visited: list[torch.Tensor] = []

    def keep(pipe, step, timestep, values):
        values["latents"].retain_grad()
        visited.append(values["latents"])
        return values

    call = type(pipe).__call__.__wrapped__  # type: ignore[attr-defined]  # without torch.no_grad
    x0 = call(
        pipe,
        latents=x_T,
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=keep,
        **embeds,
    ).images
    return x0, visited


def optimise(
    pipe: DiffusionPipeline,
    problem: tuple[torch.Tensor, torch.Tensor, dict[str, Any]],
    args: argparse.Namespace,
    full: bool,
) -> dict:
    """Move x_T towards the target with Adam. problem: x_T, the target x0, the prompts' embeds.

    Return the loss, (iterations, B), the gradient's norm, (iterations, B), and, for the full
    gradient, its norm at every x_t, (iterations, steps).
    """
    x_T, target, embeds = problem
    x = x_T.clone().requires_grad_(True)
    optimizer, gain = torch.optim.Adam([x], lr=args.lr), sampler_gain(pipe.scheduler, args.steps)
    losses, norms, norms_at = [], [], []
    for _ in tqdm(range(args.iterations), desc=TITLES["full" if full else "msd"]):
        visited: list[torch.Tensor] = []
        if full:
            x0, visited = sample_with_gradient(pipe, x, embeds, args.steps)
            loss = F.mse_loss(x0, target)
        else:
            x0 = sample_latents(pipe, x, embeds, args.steps)
            loss = msd_loss(x0, x, target, gain)
        optimizer.zero_grad()
        loss.backward()
        losses.append((x0.detach() - target).pow(2).mean((1, 2, 3)).tolist())
        norms.append(_norms(x).tolist())
        if full:
            norms_at.append([_norms(x_t).mean().item() for x_t in visited if x_t.grad is not None])
        optimizer.step()
    return {"loss": losses, "gradient_norm": norms, "gradient_norm_at_x_t": norms_at}


def jacobian(
    pipe: DiffusionPipeline, x_T: torch.Tensor, embeds: dict[str, Any], args: argparse.Namespace
) -> list[dict]:
    """Return the mean size of diagonal and other entries of d epsilon / d x_t at every timestep.

    The mean is over images and `--rows` rows drawn at random.
    """
    path, visited = Trajectories(pipe), []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, inputs: visited.append((inputs[0].detach(), int(inputs[1])))
    )
    sample_latents(pipe, x_T, embeds, args.steps)
    handle.remove()
    generator, result = torch.Generator().manual_seed(0), []
    for x_t, t in tqdm(visited, desc="Jacobian"):
        diagonal, others = [], []
        for i in range(len(x_t)):
            # Gradients of the drawn entries of epsilon, one copy of x_t for each.
            rows = torch.randperm(x_t[i].numel(), generator=generator)[: args.rows]
            copies = torch.arange(len(rows))
            x = x_t[i : i + 1].repeat(len(rows), 1, 1, 1).requires_grad_(True)
            times = torch.full((len(rows),), t, device=x.device)
            text = embeds["prompt_embeds"][i : i + 1].expand(len(rows), -1, -1)
            noise = path.x0_and_noise(times, x, pipe.unet(x, times, text).sample)[1]
            (gradient,) = torch.autograd.grad(noise.flatten(1)[copies, rows].sum(), x)
            sizes = gradient.flatten(1).abs()
            entries = sizes[copies, rows]
            diagonal.append(entries.mean().item())
            others.append(((sizes.sum() - entries.sum()) / (sizes.numel() - len(rows))).item())
        means = {"diagonal": float(np.mean(diagonal)), "off_diagonal": float(np.mean(others))}
        result.append({"t": t} | means)
    return result


def plot(result: dict, path: Path) -> None:
    """Draw the curves to a PNG file."""
    figure = Figure(figsize=(17, 3.6), layout="constrained", dpi=110)
    loss_axes, norm_axes, path_axes, jacobian_axes = figure.subplots(1, 4)
    for name, colour in (("msd", "tab:blue"), ("full", "tab:orange")):
        for axes, quantity in ((loss_axes, "loss"), (norm_axes, "gradient_norm")):
            values = np.array(result[name][quantity])
            mean = np.exp(np.log(values).mean(1))
            axes.semilogy(values, color=colour, alpha=0.25, linewidth=0.8)
            axes.semilogy(mean, color=colour, label=TITLES[name])
            axes.set(title=quantity.replace("_", " "), xlabel="iteration")
    loss_axes.legend()
    norms = np.array(result["full"]["gradient_norm_at_x_t"])
    for i in np.linspace(0, len(norms) - 1, CURVES).astype(int):
        path_axes.semilogy(range(1, norms.shape[1] + 1), norms[i], label=f"iteration {i + 1}")
    path_axes.set(title="full gradient: its norm at x_t", xlabel="sampling steps done")
    path_axes.legend(fontsize=7)
    timesteps = [row["t"] for row in result["jacobian"]]
    for name, colour in (("diagonal", "tab:blue"), ("off_diagonal", "tab:gray")):
        sizes = [row[name] for row in result["jacobian"]]
        jacobian_axes.semilogy(timesteps, sizes, "o-", color=colour, label=name.replace("_", " "))
    jacobian_axes.set(title="Jacobian of the noise prediction", xlabel="t")
    jacobian_axes.legend()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Optimise, differentiate and write the figures."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="assets/emoji", help="folder or hub id of the pipeline")
    add("--n", type=int, default=8, help="prompts, each with one x_T")
    add("--steps", type=int, default=10, help="N, of the unguided sampling")
    add("--iterations", type=int, default=100)
    add("--lr", type=float, default=0.02, help="of Adam, the same for both gradients")
    add("--guidance_scale", type=float, help="the model's usual one by default")
    add("--rows", type=int, default=128, help="rows of the Jacobian, an image and timestep")
    add("--output", type=Path, required=True, help="JSON file of the results")
    add("--plot", type=Path, help="PNG file of the curves")
    args = parser.parse_args(arguments)
    pipe = with_sampler(load_pipeline(args.backbone, dtype=torch.float32), "DDIM")
    pipe.unet.requires_grad_(False)
    embeds: dict[str, Any] = encode_prompt(pipe, held_out_prompts(args.n))
    x_T = draw_noise(pipe, FIRST_EVALUATION_SEED, args.n).to(pipe.device)
    scale = args.guidance_scale or usual_guidance_scale(pipe, args.backbone)
    target = sample_latents(pipe, x_T, embeds, SAMPLING_STEPS, guidance_scale=scale)

    result: dict[str, Any] = {
        name: optimise(pipe, (x_T, target, embeds), args, full=name == "full") for name in TITLES
    }
    few_embeds = {name: value[:JACOBIAN_PROMPTS] for name, value in embeds.items()}
    result |= {
        "n": args.n,
        "first_seed": FIRST_EVALUATION_SEED,
        "steps": args.steps,
        "lr": args.lr,
        "jacobian": jacobian(pipe, x_T[:JACOBIAN_PROMPTS], few_embeds, args),
    }
    write_json(args.output, result)
    if args.plot:
        plot(result, args.plot)
    print(table(result))


def table(result: dict) -> str:
    """Return the figures as two Markdown tables."""
    gradients = []
    for name, title in TITLES.items():
        loss, norm = np.array(result[name]["loss"]), np.array(result[name]["gradient_norm"])
        growth = (norm.max(0) / norm[0]).mean()
        ends = [f"{loss[0].mean():.4f}", f"{loss[-1].mean():.4f}", f"{growth:.1f}"]
        gradients.append([title, *ends])
    entries = [
        [
            row["t"],
            f"{row['diagonal']:.3f}",
            f"{row['off_diagonal']:.5f}",
            f"{row['diagonal'] / row['off_diagonal']:.0f}",
        ]
        for row in result["jacobian"]
    ]
    norm_title = "largest norm of the gradient / first"
    return "\n\n".join(
        [
            markdown_table(["gradient", "loss at the start", "at the end", norm_title], gradients),
            markdown_table(
                ["t", "mean size of the Jacobian's diagonal entries", "of the others", "ratio"],
                entries,
            ),
        ]
    )


def _norms(x: torch.Tensor) -> torch.Tensor:
    """Return the norm of each item's gradient, (B,), of a loss that is the mean over items."""
    if x.grad is None:
        raise ValueError("backward() has not reached this tensor.")
    return (x.grad * len(x)).flatten(1).norm(dim=1)


if __name__ == "__main__":
    run_script(main)
