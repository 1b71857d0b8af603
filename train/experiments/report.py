"""Write one page of what was measured on the embedded model, each table beside the paper's own.

    python train/experiments/report.py

Reads the JSON files in assets/results/paper, which train/experiments/reproduce.py fills, and writes
report.md and its plots there. Sections without results are left out. The paper's figures are
quoted.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from train.captions import held_out_prompts
from train.common import ROOT, argument_parser, markdown_table, run_script
from train.emoji.judge import EmojiJudge
from train.experiments import (
    compatibility,
    frontier,
    inversion_error,
    noise_gradients,
    novelty,
    study_figures,
    variety,
)
from train.experiments.reproduce import (
    FEW_STEPS,
    LEARNING_RATES,
    MODELS,
    RESULTS,
    SAMPLERS_TRIED,
    STEPS,
    STRENGTHS,
    TEACHERS,
    TURBO_STEPS,
)
from train.measurement import SHOWN, arms_table

Results = dict[str, dict]
Row = tuple[str, str, str]  # title, result of evaluate.py, arm in it
BASE: list[Row] = [
    ("Gaussian, unguided", "base", "gaussian"),
    ("Gaussian, guided", "base", "guided"),
    ("refined, unguided", "base", "refined"),
]


def arms(results: Results, rows: list[Row]) -> str:
    """Return a table of arms, and their first images."""
    sizes = sorted(
        {(results[file]["n"], results[file]["prompts"]) for _, file, _ in rows}, reverse=True
    )
    counts = " and ".join(f"{n} images of {prompts} prompts" for n, prompts in sizes)
    summaries = [(title, results[file]["arms"][arm]) for title, file, arm in rows]
    images = [[title, f"![{title}]({file}-{arm}.webp)"] for title, file, arm in rows]
    return "\n".join(
        [
            f"n = {counts} an arm.\n",
            arms_table(summaries, EmojiJudge.figures),
            "",
            markdown_table(["", "the first images"], images),
        ]
    )


def quote(header: str, *rows: str) -> str:
    """Return the paper's own table."""
    separator = "|" + "---|" * (header.strip("|").count("|") + 1)
    return "\n".join(["The paper's:\n", header, separator, *rows])


def plain(*rows: Row) -> Callable[[Results], str]:
    """Return what writes a section of the base's arms and others."""
    return lambda results: arms(results, [*BASE, *rows])


def styles(results: Results) -> str:
    """Return the fine-tunes' arms."""
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
    """Return the few-step model's arms."""
    return arms(
        results,
        [
            (f"{noise}, {steps} step{'s' * (steps > 1)}", f"turbo-{steps}", arm)
            for steps in TURBO_STEPS
            for noise, arm in (("Gaussian", "gaussian"), ("refined", "refined"))
        ],
    )


def inversion(results: Results) -> str:
    """Return the table of DDIM inversion's errors."""
    result = results["inversion"]
    return f"n = {result['n']}.\n\n{inversion_error.table(result['steps'])}"


def samplers(results: Results) -> str:
    """Return the arms of every sampler tried, at each number of steps."""
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
    """Return the arms of every number of steps, and plot them."""
    files = [(steps, f"ddim-{steps}") for steps in FEW_STEPS] + [(20, "base")]
    colours = {"gaussian": "tab:gray", "guided": "tab:blue", "refined": "tab:orange"}
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=110)
    metrics = ("object_accuracy", "frechet_distance")
    for axes, metric in zip(figure.subplots(1, 2), metrics, strict=True):
        for arm, colour in colours.items():
            values = [results[file]["arms"][arm] for _, file in files]
            forwards = [value["forwards"] for value in values]
            axes.plot(forwards, [value[metric] for value in values], "o-", color=colour, label=arm)
            lows, highs = zip(*(value[f"{metric}_interval"] for value in values), strict=True)
            axes.fill_between(forwards, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="network forwards", title=EmojiJudge.figures[metric].title)
        axes.legend()
    figure.savefig(RESULTS / "steps.png")
    titles = {"gaussian": "Gaussian", "guided": "guided", "refined": "refined"}
    return "![Quality against network forwards](steps.png)\n\n" + arms(
        results,
        [
            (f"{steps} steps, {title}", file, arm)
            for steps, file in files
            for arm, title in titles.items()
        ],
    )


def strengths(results: Results) -> str:
    """Return the arms of every strength."""
    rows = [
        (0.0, "base", "gaussian"),
        (1.0, "base", "refined"),
        *[(value, f"strength-{value}", "refined") for value in STRENGTHS],
    ]
    return arms(results, [(f"strength {value:g}", file, arm) for value, file, arm in sorted(rows)])


def gradients(results: Results) -> str:
    """Return the tables of MSD's gradient and of the full one."""
    result = results["gradients"]
    settings = f"n = {result['n']} prompts, N = {result['steps']}"
    return (
        f"{settings}, Adam with a learning rate of {result['lr']} for both.\n\n"
        f"![](gradients.png)\n\n{noise_gradients.table(result)}"
    )


def tuning(results: Results) -> str:
    """Return what each learning rate led to.

    For networks in the refiner's place the held-out distance, for LoRAs on the denoiser the
    accuracy and Fréchet distance.
    """

    def trained(name: str, lr: float) -> str:
        return f"{results[f'tuning-{name}-{lr}']['results']['validation_refined']:.4f}"

    def measured(name: str, lr: float) -> str:
        arm = results[f"tuning-{name}-{lr}"]["arms"]["gaussian"]
        return f"{arm['object_accuracy']:.3f}, {arm['frechet_distance']:.2f}"

    rows = [
        ("refiner", "lora", trained),
        ("MLP", "mlp", trained),
        ("from scratch", "scratch", trained),
        ("noise loss", "noise", trained),
        ("guidance distillation", "guidance", measured),
        ("fine-tuning on guided images", "images", measured),
    ]
    n = results[f"tuning-guidance-{LEARNING_RATES[0]}"]["n"]
    return (
        "A quarter of each training. The first four: mean squared distance to the guided latents "
        "on held-out prompts, smaller is better; the others: object accuracy and Fréchet distance "
        f"of {n} images.\n\n"
    ) + markdown_table(
        ["learning rate", *(f"{lr:g}" for lr in LEARNING_RATES)],
        [[title, *(cell(name, lr) for lr in LEARNING_RATES)] for title, name, cell in rows],
    )


def forwards_spent(results: Results, model: str) -> str:
    """Return a model's frontier: the plot and the winners."""
    name = f"frontier-{model}"
    result = results[name]
    frontier.plot(result, RESULTS / f"{name}.png")
    return f"![Quality by forwards]({name}.png)\n\n{frontier.table(result)}"


def seeds_of_a_prompt(results: Results, model: str) -> str:
    """Return a model's quality and variety: the plot and the tables."""
    name = f"variety-{model}"
    result = results[name]
    variety.plot(result, RESULTS / f"{name}.png")
    return f"![Quality by variety]({name}.png)\n\n{variety.table(result)}"


def conditions(results: Results, model: str) -> str:
    """Return what refined noise closes of a model's gap in each condition."""
    result = results[f"compatibility-{model}"]
    settings = f"n = {result['n']} an arm, {result['steps']} steps"
    return f"{settings}.\n\n{compatibility.table(result)}"


def recipe(results: Results, model: str) -> str:
    """Return what each factor of a model's training recipe does: the plot and the table."""
    name = f"study-{model}"
    study_figures.plot({model: results[name]}, RESULTS / f"{name}.png")
    return f"![Each factor of the recipe]({name}.png)\n\n{study_figures.table(results[name])}"


def recipes(results: Results) -> str:
    """Return the plot of all models' training recipes."""
    found = {model: results[f"study-{model}"] for model in MODELS}
    study_figures.plot(found, RESULTS / "study.png")
    return (
        "Percent of the way to the guided latents (solid) and of the accuracy gap (dashed); filled "
        "marks are base recipes.\n\n"
        "![Each factor of the recipe, a colour for each model](study.png)"
    )


def of_each_model(
    title: str, name: str, write: Callable[..., str]
) -> list[tuple[str, list[str], Callable[[Results], str], str]]:
    """Return a section for each embedded model."""
    return [
        (f"{title}: {model}", [f"{name}-{model}"], partial(write, model=model), "")
        for model in MODELS
    ]


FID = "| | FID ↓ | IS ↑ |"
# Title, the results it needs, what writes it, and the paper's own table.
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
        "N in the loss (table 15): 5, 10, and the preset's",
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
        "How the targets are guided",
        ["base", *[f"teacher-{name}" for name in TEACHERS]],
        plain(
            *[
                (f"refined, trained towards {name}", f"teacher-{name}", "refined")
                for name in TEACHERS
            ]
        ),
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
    ("The training recipe", [f"study-{model}" for model in MODELS], recipes, ""),
    *of_each_model("The training recipe", "study", recipe),
    *of_each_model("Quality by forwards", "frontier", forwards_spent),
    *of_each_model("Variety among seeds", "variety", seeds_of_a_prompt),
    *of_each_model("With what else people do", "compatibility", conditions),
    ("The gradient (figures 6, 31 to 36)", ["gradients"], gradients, ""),
    (
        "Nearness to training pictures (figure 12)",
        ["novelty"],
        lambda results: novelty.table(results["novelty"]),
        "",
    ),
]


def _outdated(results: dict[str, dict]) -> list[str]:
    """Return a note if the base's files are no longer those that were measured."""
    about = results.get("base", {}).get("settings", {}).get("about", {})
    changed = [
        name
        for name, sha256 in about.items()
        if (ROOT / name).is_file()
        and hashlib.sha256((ROOT / name).read_bytes()).hexdigest() != sha256
    ]
    if not changed:
        return []
    return [f"\n**Measured on earlier weights**: since then `{'`, `'.join(changed)}` has changed."]


def main(arguments: list[str] | None = None) -> None:
    """Write the report of the results that exist."""
    argument_parser(__doc__).parse_args(arguments)
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    first_seed = results.get("base", {}).get("first_seed")
    parts = [
        "# The paper's experiments on the embedded model\n",
        "Made by `python train/experiments/reproduce.py`: held-out prompts, 20 DDIM steps unless "
        f"stated, seeds from {first_seed}, 95 % bootstrap intervals over prompts. Networks that "
        "are compared with the refiner had its targets and as many network evaluations (appendix "
        "A.7); the other networks in its place and the other N had as many steps, and one was "
        "trained for longer. A Fréchet distance depends on n: compare within a table. The first "
        "images have the same seeds everywhere and these prompts: "
        f"{'; '.join(held_out_prompts(SHOWN))}.",
        *_outdated(results),
    ]
    missing = []
    for title, files, write, quoted in SECTIONS:
        if all(file in results for file in files):
            section = f"\n## {title}\n\n{write(results)}"
            parts.append(section + (f"\n\n{quoted}" if quoted else ""))
        else:
            missing.append(title)
    if missing:
        parts.append(f"\n## Not measured yet\n\n{'; '.join(missing)}.")
    path = RESULTS / "report.md"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    written = len(SECTIONS) - len(missing)
    print(f"{path}: {written} of {len(SECTIONS)} sections.")


if __name__ == "__main__":
    run_script(main)
