"""One page of what was measured on the embedded model, each table beside the paper's own.

    python train/experiments/report.py

Reads the JSON files in assets/results/paper, which train/experiments/reproduce.py fills, and writes report.md and its plots there.  What was not
measured yet is left out.  The paper's figures are quoted; nothing of them was measured here.
"""

import argparse
import json
from collections.abc import Callable

from matplotlib.figure import Figure

from train.evaluate import SHOWN, TITLES, held_out_prompts, table
from train.experiments.reproduce import (
    FEW_STEPS,
    LEARNING_RATES,
    RESULTS,
    ROOT,
    SAMPLERS_TRIED,
    STEPS,
    STRENGTHS,
    TURBO_STEPS,
)

Results = dict[str, dict]
Row = tuple[str, str, str]  # what it is called, a result of evaluate.py, the arm in it
BASE: list[Row] = [
    ("Gaussian, unguided", "base", "gaussian"),
    ("Gaussian, guided", "base", "guided"),
    ("refined, unguided", "base", "refined"),
]


def arms(results: Results, rows: list[Row]) -> str:
    """A table of arms, and their first images."""
    counts = sorted(
        {(results[file]["n"], results[file]["prompts"]) for _, file, _ in rows}, reverse=True
    )
    return "\n".join(
        [
            f"n = {' and '.join(f'{n} images of {prompts} prompts' for n, prompts in counts)} an arm.\n",
            table([(title, results[file]["arms"][arm]) for title, file, arm in rows]),
            "\n| | the first images |",
            "|---|---|",
            *[f"| {title} | ![{title}]({file}-{arm}.webp) |" for title, file, arm in rows],
        ]
    )


def quote(header: str, *rows: str) -> str:
    return "\n".join(
        ["The paper's:\n", header, "|" + "---|" * header.strip("|").count("|") + "---|", *rows]
    )


def plain(*rows: Row) -> Callable[[Results], str]:
    """A section of the base's arms and others."""
    return lambda results: arms(results, [*BASE, *rows])


def styles(results: Results) -> str:
    return arms(
        results,
        [
            (f"{style}: {title}", f"emoji-{style}", arm)
            for style in ("clay", "ink")
            for title, arm in (
                ("Gaussian, unguided", "gaussian"),
                ("Gaussian, guided", "guided"),
                ("refined by the base's refiner", "refined"),
            )
        ],
    )


def turbo(results: Results) -> str:
    return arms(
        results,
        [
            (f"{noise}, {steps} step{'s' * (steps > 1)}", f"turbo-{steps}", arm)
            for steps in TURBO_STEPS
            for noise, arm in (("Gaussian", "gaussian"), ("refined", "refined"))
        ],
    )


def inversion(results: Results) -> str:
    rows = [
        f"| {steps} | {row['psnr']:.2f} [{row['psnr_interval'][0]:.2f}, {row['psnr_interval'][1]:.2f}] |"
        for steps, row in results["inversion"]["steps"].items()
    ]
    return "\n".join(
        [f"n = {results['inversion']['n']}.\n", "| steps | PSNR in dB ↑ |", "|---|---|", *rows]
    )


def samplers(results: Results) -> str:
    return arms(
        results,
        [
            (f"{title}, {steps} steps, {noise}", f"{name}-{steps}", arm)
            for name, title in SAMPLERS_TRIED.items()
            for steps in STEPS
            for noise, arm in (("Gaussian", "gaussian"), ("refined", "refined"))
        ],
    )


def few_steps(results: Results) -> str:
    files = [(steps, f"ddim-{steps}") for steps in FEW_STEPS] + [(20, "base")]
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=110)
    for axis, metric in zip(figure.subplots(1, 2), ("object_accuracy", "frechet_distance")):
        for arm, colour in (
            ("gaussian", "tab:gray"),
            ("guided", "tab:blue"),
            ("refined", "tab:orange"),
        ):
            values = [results[file]["arms"][arm] for _, file in files]
            axis.plot(
                [value["forwards"] for value in values],
                [value[metric] for value in values],
                "o-",
                color=colour,
                label=arm,
            )
            axis.fill_between(
                [value["forwards"] for value in values],
                *zip(*[value[f"{metric}_interval"] for value in values]),
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        axis.set(xlabel="UNet forwards", title=TITLES[metric])
        axis.legend()
    figure.savefig(RESULTS / "steps.png")
    return "![Quality against UNet forwards](steps.png)\n\n" + arms(
        results,
        [
            (f"{steps} steps, {title}", file, arm)
            for steps, file in files
            for title, arm in (
                ("Gaussian", "gaussian"),
                ("guided", "guided"),
                ("refined", "refined"),
            )
        ],
    )


def strengths(results: Results) -> str:
    rows = [
        (0.0, "base", "gaussian"),
        (1.0, "base", "refined"),
        *[(value, f"strength-{value}", "refined") for value in STRENGTHS],
    ]
    return arms(results, [(f"strength {value:g}", file, arm) for value, file, arm in sorted(rows)])


def gradients(results: Results) -> str:
    result = results["gradients"]
    lines = [
        f"n = {result['n']} prompts, N = {result['steps']}, Adam with a learning rate of {result['lr']} for both.\n",
        "![](gradients.png)\n",
        "| gradient | loss at the start | at the end | largest norm of the gradient / first |",
        "|---|---|---|---|",
    ]
    for name, title in (("msd", "MSD"), ("full", "full")):
        loss, norms = (
            result[name]["loss"],
            list(zip(*result[name]["gradient_norm"])),
        )  # of each prompt
        lines.append(
            f"| {title} | {sum(loss[0]) / len(loss[0]):.4f} | {sum(loss[-1]) / len(loss[-1]):.4f} | {sum(max(norm) / norm[0] for norm in norms) / len(norms):.1f} |"
        )
    lines += [
        "\n| t | mean size of the Jacobian's diagonal entries | of the others | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['t']} | {row['diagonal']:.3f} | {row['off_diagonal']:.5f} | {row['diagonal'] / row['off_diagonal']:.0f} |"
        for row in result["jacobian"]
    ]
    return "\n".join(lines)


def tuning(results: Results) -> str:
    """The held-out loss in the trainer's terms, or the accuracy and Fréchet distance of LoRAs on the denoiser."""

    def trained(name: str, lr: float) -> str:
        return f"{results[f'tuning-{name}-{lr}']['results']['validation_refined']:.4f}"

    def measured(name: str, lr: float) -> str:
        arm = results[f"tuning-{name}-{lr}"]["arms"]["gaussian"]
        return f"{arm['object_accuracy']:.3f}, {arm['frechet_distance']:.2f}"

    rows = [
        (title, name, trained)
        for title, name in (
            ("refiner", "lora"),
            ("MLP", "mlp"),
            ("from scratch", "scratch"),
            ("noise loss", "noise"),
        )
    ]
    rows += [
        (title, name, measured)
        for title, name in (
            ("guidance distillation", "guidance"),
            ("fine-tuning on guided images", "images"),
        )
    ]
    n = results[f"tuning-guidance-{LEARNING_RATES[0]}"]["n"]
    return "\n".join(
        [
            "A quarter of each training. The first four: mean squared distance to the guided latents on held-out prompts, smaller is better; the others: object accuracy "
            f"and Fréchet distance of {n} images.\n",
            f"| learning rate | {' | '.join(f'{lr:g}' for lr in LEARNING_RATES)} |",
            "|---|" + "---|" * len(LEARNING_RATES),
            *[
                f"| {title} | {' | '.join(make(name, lr) for lr in LEARNING_RATES)} |"
                for title, name, make in rows
            ],
        ]
    )


FID = "| | FID ↓ | IS ↑ |"
# Title, the files it is made of, how, and the paper's own.
SECTIONS: list[tuple[str, list[str], Callable[[Results], str], str]] = [
    (
        "Three arms and guidance distillation (table 2)",
        ["base", "guidance-distilled"],
        plain(("guidance-distilled, unguided", "guidance-distilled", "gaussian")),
        quote(
            FID,
            "| SD2.1: Gaussian, unguided | 42.71 | 20.86 |",
            "| Gaussian, guided | 16.19 | 37.95 |",
            "| guidance-distilled | 19.09 | 33.45 |",
            "| refined, unguided | 14.62 | 34.90 |",
        ),
    ),
    (
        "Loss in the space of noise or of images (table 1, figure 5)",
        ["base", "noise-loss"],
        plain(("refiner trained on inverted noise", "noise-loss", "refined")),
        quote(
            "| | PickScore ↑ | CLIPScore ↑ |",
            "| noise space | 17.97 | 18.39 |",
            "| image space | 21.62 | 36.43 |",
        ),
    ),
    (
        "What DDIM inversion loses (table 11)",
        ["inversion"],
        inversion,
        quote(
            "| steps | PSNR ↑ |",
            *[
                f"| {steps} | {psnr} |"
                for steps, psnr in (
                    (10, 12.16),
                    (20, 15.82),
                    (50, 23.24),
                    (200, 22.93),
                    (500, 17.71),
                    (999, 14.84),
                )
            ],
        ),
    ),
    (
        "Fine-tunes, with the base's refiner (table 4)",
        ["emoji-clay", "emoji-ink"],
        styles,
        quote(
            "| | PickScore ↑ | CLIPScore ↑ |",
            "| clay: Gaussian, unguided | 17.95 | 18.31 |",
            "| Gaussian, guided | 19.17 | 26.36 |",
            "| refined | 18.82 | 23.61 |",
            "| anime: Gaussian, unguided | 16.47 | 22.37 |",
            "| Gaussian, guided | 17.68 | 30.04 |",
            "| refined | 18.08 | 29.62 |",
        ),
    ),
    (
        "A few-step model (table 5)",
        [f"turbo-{steps}" for steps in TURBO_STEPS],
        turbo,
        quote(
            FID,
            "| SD-Turbo: Gaussian, 1 step | 27.18 | 34.31 |",
            "| Gaussian, 2 steps | 30.24 | 32.46 |",
            "| refined, 1 step | 24.94 | 38.07 |",
        ),
    ),
    (
        "Guided sampling from refined noise (table 6)",
        ["base"],
        plain(("refined, guided", "base", "refined_guided")),
        quote(
            FID,
            "| SD2.1: Gaussian, guided | 18.74 | 32.55 |",
            "| refined, guided | 22.94 | 34.37 |",
        ),
    ),
    (
        "A Gaussian for every prompt (table 10)",
        ["base", "mlp"],
        plain(("MLP that predicts mean and deviation", "mlp", "refined")),
        quote("| | FID ↓ |", "| MLP | 217.30 |", "| refiner | 13.74 |"),
    ),
    (
        "Fine-tuning the model on guided images (table 12)",
        ["base", "fine-tuned"],
        plain(("fine-tuned, unguided", "fine-tuned", "gaussian")),
        quote(
            FID,
            "| SiT-XL/2: unguided | 18.43 | 40.00 |",
            "| fine-tuned on guided images | 12.31 | 58.59 |",
            "| refined | 10.42 | 50.39 |",
        ),
    ),
    (
        "LoRA or the same network from scratch (table 14)",
        ["base", "scratch"],
        plain(("from scratch", "scratch", "refined")),
        quote("| | FID ↓ |", "| from scratch | 37.87 |", "| LoRA | 13.74 |"),
    ),
    (
        "N in the loss (table 15): 5, 10, and the preset's 6",
        ["base", "n5", "n10"],
        plain(
            ("refined, trained with N = 5", "n5", "refined"),
            ("refined, trained with N = 10", "n10", "refined"),
        ),
        quote("| N | FID ↓ |", "| 5 | 13.74 |", "| 10 | 13.36 |"),
    ),
    (
        "Samplers and steps (appendix A.10)",
        [f"{name}-{steps}" for name in SAMPLERS_TRIED for steps in STEPS],
        samplers,
        "",
    ),
    (
        "How few steps are enough",
        ["base", *[f"ddim-{steps}" for steps in FEW_STEPS]],
        few_steps,
        "",
    ),
    (
        "Strength (figure 13)",
        ["base", *[f"strength-{value}" for value in STRENGTHS]],
        strengths,
        "",
    ),
    (
        "Parametrisation of the correction",
        ["base", "raw", "difference"],
        plain(
            ("raw: x + UNet(x)", "raw", "refined"),
            ("difference, two forwards", "difference", "refined"),
        ),
        "",
    ),
    (
        "Seeds of training",
        ["base", "seed1", "seed2"],
        plain(("second seed", "seed1", "refined"), ("third seed", "seed2", "refined")),
        "",
    ),
    (
        "Four times the targets and steps, N' = 20, N = 10",
        ["base", "longer"],
        plain(("trained for longer", "longer", "refined")),
        "",
    ),
    (
        "Learning rates",
        [
            f"tuning-{name}-{lr}"
            for name in ("lora", "mlp", "scratch", "noise", "guidance", "images")
            for lr in LEARNING_RATES
        ],
        tuning,
        "",
    ),
    ("The gradient (figures 6, 31 to 36)", ["gradients"], gradients, ""),
    (
        "Nearness to training pictures (figure 12)",
        ["novelty"],
        lambda results: "\n".join(
            [
                "| images | n | mean distance to the nearest training picture | 5th percentile |",
                "|---|---|---|---|",
                *[
                    "| {} | {} | {:.2f} [{:.2f}, {:.2f}] | {:.2f} |".format(
                        name,
                        row["n"],
                        row["distance"],
                        *row["distance_interval"],
                        row["fifth_percentile"],
                    )
                    for name, row in results["novelty"].items()
                ],
            ]
        ),
        "",
    ),
]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    settings = results.get("base", {})
    parts = [
        "# The paper's experiments on the embedded model\n",
        f"Held-out prompts, 20 DDIM steps where nothing else is said, seeds from {settings.get('first_seed')}, 95 % bootstrap intervals over prompts; made by "
        "`python train/experiments/reproduce.py`. Networks that are compared with the refiner had its targets and as many network evaluations (appendix A.7), but for the "
        "other networks in its place and the other N, which had as many steps, and the one trained for longer. A Fréchet distance depends on n: compare within a table. The first images are of the same seeds everywhere and of these prompts: "
        f"{'; '.join(held_out_prompts(SHOWN))}.",
    ]
    missing = []
    for title, files, make, theirs in SECTIONS:
        if all(file in results for file in files):
            parts.append(f"\n## {title}\n\n{make(results)}" + (f"\n\n{theirs}" if theirs else ""))
        else:
            missing.append(title)
    if missing:
        parts.append(f"\n## Not measured yet\n\n{'; '.join(missing)}.")
    (RESULTS / "report.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(
        f"{(RESULTS / 'report.md').relative_to(ROOT)}: {len(SECTIONS) - len(missing)} of {len(SECTIONS)} sections."
    )


if __name__ == "__main__":
    main()
