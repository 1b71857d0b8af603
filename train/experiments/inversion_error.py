"""Measure what DDIM inversion of guided images loses (appendix A.11, table 11).

    python train/experiments/inversion_error.py --n 100 --output inversion.json

Guided images are inverted to noise and sampled again without guidance, in as many steps; the error
is that of the pictures.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from noiserefine import draw_noise
from noiserefine.guidance import sample_latents
from noiserefine.inversion import ddim_inversion
from noiserefine.latents import decode
from noiserefine.models.loading import load_pipeline
from noiserefine.models.usage import usual_guidance_scale
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from train.captions import HELD_OUT, read_prompts, repeat_to
from train.common import (
    FIRST_EVALUATION_SEED,
    argument_parser,
    markdown_table,
    mean_and_interval,
    run_script,
    with_interval,
    write_json,
)

WHITE = 255
SAMPLING_STEPS = 20  # of the guided images


def main(arguments: list[str] | None = None) -> None:
    """Sample, invert, sample again and write the figures."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="assets/emoji", help="folder or hub id of the pipeline")
    add("--prompts", default=HELD_OUT, help="prompt file")
    add("--steps", type=int, nargs="+", default=[10, 20, 50, 100, 200, 500, 999])
    add("--guidance_scale", type=float, help="the model's usual one by default")
    add("--n", type=int, default=100)
    add("--batch_size", type=int, default=50)
    add("--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args(arguments)
    pipe = load_pipeline(args.backbone)
    scale = args.guidance_scale or usual_guidance_scale(pipe, args.backbone)
    ddim = with_sampler(pipe, "DDIM")
    prompts = repeat_to(read_prompts(args.prompts, pipe), args.n)

    psnr: dict[int, list[float]] = {steps: [] for steps in args.steps}
    for start in tqdm(range(0, args.n, args.batch_size)):
        batch_prompts = prompts[start : start + args.batch_size]
        embeds = encode_prompt(pipe, batch_prompts)
        x_T = draw_noise(pipe, FIRST_EVALUATION_SEED + start, len(batch_prompts))
        x0 = sample_latents(ddim, x_T, embeds, SAMPLING_STEPS, guidance_scale=scale)
        images = [np.asarray(image, float) for image in decode(pipe, x0)]
        for steps in args.steps:
            inverted = ddim_inversion(pipe, x0, embeds, steps)
            again = decode(pipe, sample_latents(ddim, inverted, embeds, steps))
            for image, reconstruction in zip(images, again, strict=True):
                error = ((image - np.asarray(reconstruction, float)) ** 2).mean()
                psnr[steps].append(10 * np.log10(WHITE**2 / error))

    rows = {}
    for steps, values in psnr.items():
        mean, bounds = mean_and_interval(values)
        rows[steps] = {"psnr": mean, "psnr_interval": bounds}
    result = {"n": args.n, "first_seed": FIRST_EVALUATION_SEED, "guidance_scale": scale}
    write_json(args.output, result | {"steps": rows})
    print(table(rows))


def table(rows: dict) -> str:
    """Return a Markdown table of PSNR, a row for each number of steps."""
    return markdown_table(
        ["steps", "PSNR in dB ↑"],
        [[steps, with_interval(row["psnr"], row["psnr_interval"])] for steps, row in rows.items()],
    )


if __name__ == "__main__":
    run_script(main)
