"""The paper's tables and figures in miniature, on the embedded model: trains, measures and reports.

    python train/experiments/reproduce.py --work_dir runs/paper                # all of it, in hours; goes on where it stopped
    python train/experiments/reproduce.py --work_dir runs/paper --only table1 table5
    python train/experiments/reproduce.py --list

Every experiment is a few commands of this folder.  A command whose result is there is not run again: JSON files are kept in assets/results/paper,
LoRAs and judges that are shipped in their places, everything else under --work_dir; with another embedded model, remove them first.  The pictures of
the style clay need assets/ of the npm package @lobehub/fluent-emoji-3d as WORK_DIR/fluent.  At the end train/experiments/report.py writes assets/results/paper/report.md.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

from train.train_refiner import parse, plan

RESULTS = ROOT / "assets" / "results" / "paper"
REFINER, LORAS, LORA = (
    "assets/refiners/emoji",
    ROOT / "assets" / "loras",
    "pytorch_lora_weights.safetensors",
)
LEARNING_RATES = (
    3e-4,
    1e-3,
    3e-3,
)  # tried in a quarter of each training, by the experiment "tuning"; the best of them are used below, 1e-3 where none is named
SAMPLERS_TRIED = {
    "dpm2m": "DPM++ 2M",
    "dpmsde": "DPM++ SDE",
    "euler": "Euler",
    "heunedm": "Heun (EDM)",
}  # beside DDIM, by the name of their results
STEPS, FEW_STEPS, TURBO_STEPS, STRENGTHS = (
    (10, 20, 50),
    (4, 6, 10, 14),
    (1, 2, 4),
    (0.25, 0.5, 0.75, 1.25, 1.5),
)
BUDGET = plan(parse(["--preset", "emoji", "--output_dir", "x"]), 1)[1][
    "training"
]  # network evaluations of the refiner's training, after its targets


@dataclass(frozen=True)
class Command:
    """A script of this folder and the file that it leaves, which means that it is done."""

    script: str
    options: tuple[str, ...]
    result: Path
    kept: Path | None = None  # where a copy of it stays, in the repository

    def run(self) -> None:
        if self.kept and self.kept.exists():
            return
        if not self.result.exists():
            words = [
                sys.executable,
                *([self.script] if self.script.endswith(".py") else ["-m", self.script]),
                *self.options,
            ]
            print("$", shlex.join(words[1:]), flush=True)
            self.result.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.mkdir(parents=True, exist_ok=True)
            subprocess.run(words, check=True)
        if self.kept:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.result, self.kept)
            for picture in self.result.with_suffix("").glob(
                "*.webp"
            ):  # of evaluate.py: the first images of an arm
                shutil.copy(picture, self.kept.with_name(f"{self.kept.stem}-{picture.name}"))


def experiments(work: Path, n: int = 1000) -> dict[str, list[Command]]:
    """The commands of each experiment, in an order in which they can be run."""
    shared = (
        "--targets_of",
        str(work / "refiner"),
    )  # the shipped refiner's, made again by the run "refiner"
    inverted = ("--loss", "noise", "--targets_of", str(work / "inverted"))

    def train(name: str, *options: str, kept: Path | None = None) -> Command:
        return Command(
            "train/train_refiner.py",
            ("--preset", "emoji", *options, "--output_dir", str(work / name)),
            work / name / "refiner.json",
            kept,
        )

    def evaluate(name: str, *options: str, images: int = n) -> Command:
        result = work / "results" / f"{name}.json"
        return Command(
            "train/evaluate.py",
            (*options, "--n", str(images), "--output", str(result)),
            result,
            RESULTS / f"{name}.json",
        )

    def denoiser(name: str, loss: str, *options: str, kept: Path | None = None) -> Command:
        folder = work / name
        return Command(
            "train/experiments/denoiser_lora.py",
            (
                "--loss",
                loss,
                "--targets",
                str(work / "refiner"),
                *options,
                "--output_dir",
                str(folder),
            ),
            folder / LORA,
            kept,
        )

    def compared(name: str, *options: str) -> list[Command]:
        """A run of the trainer with other options, and what its result does."""
        return [
            train(name, *options),
            evaluate(name, "--refiner", str(work / name), "--arms", "refined"),
        ]

    def tuned() -> Iterator[Command]:
        """A quarter of each training with every learning rate: the held-out distance of the trainer, or accuracy and Fréchet distance of a changed denoiser."""
        for lr in LEARNING_RATES:
            for network in ("lora", "mlp", "scratch"):
                name = f"tuning-{network}-{lr}"
                yield train(
                    name,
                    *shared,
                    "--network",
                    network,
                    "--epochs",
                    "1",
                    "--lr",
                    str(lr),
                    kept=RESULTS / f"{name}.json",
                )
            name = f"tuning-noise-{lr}"
            yield train(
                name, *inverted, "--epochs", "4", "--lr", str(lr), kept=RESULTS / f"{name}.json"
            )
            for loss in ("guidance", "images"):
                name = f"tuning-{loss}-{lr}"
                yield denoiser(name, loss, "--evaluations", str(BUDGET // 4), "--lr", str(lr))
                yield evaluate(
                    name, "--lora", str(work / name), "--arms", "gaussian", images=n // 4
                )

    def sampled(
        name: str, sampler: str, steps: Iterable[int], arms: list[str], images: int
    ) -> Iterator[Command]:
        for count in steps:
            yield evaluate(
                f"{name}-{count}",
                "--refiner",
                REFINER,
                "--sampler",
                sampler,
                "--steps",
                str(count),
                "--arms",
                *arms,
                images=images,
            )

    def styled(name: str) -> list[Command]:
        """Pictures of a style, a fine-tune and a judge made of them, and the base's refiner on the fine-tune."""
        pictures, judge, lora = (
            work / name / "pictures",
            ROOT / f"train/emoji/classifier-{name}.safetensors",
            LORAS / f"emoji-{name}",
        )
        return [
            Command(
                "train.emoji.render",
                (
                    "--style",
                    name,
                    "--artwork",
                    str(work / "fluent"),
                    "--per_object",
                    "60",
                    "--held_out_per_pair",
                    "4",
                    "--output_dir",
                    str(pictures),
                ),
                pictures / "judge_classes.npy",
            ),
            Command(
                "train.emoji.style",
                ("--pictures", str(pictures), "--output_dir", str(lora)),
                lora / LORA,
            ),
            Command(
                "train.emoji.classifier",
                (
                    "--pictures",
                    str(pictures),
                    "--checkpoint",
                    str(pictures / "judge.pt"),
                    "--steps",
                    "500",
                    "--lr",
                    "1e-3",
                    "--start_from",
                    "train/emoji/classifier.safetensors",
                    "--output",
                    str(judge),
                ),
                judge,
            ),
            evaluate(
                f"emoji-{name}",
                "--backbone",
                f"emoji-{name}",
                "--refiner",
                REFINER,
                "--metrics",
                f"judge={judge.relative_to(ROOT)}",
            ),
        ]

    base = evaluate(
        "base", "--refiner", REFINER, "--arms", "gaussian", "guided", "refined", "refined_guided"
    )
    refiner = train("refiner")
    invert = train(
        "inverted", "--loss", "noise", "--epochs", "0.01"
    )  # one step: for its targets, which hold the inverted noise
    return {
        "base": [base],
        "tuning": [refiner, invert, *tuned()],
        "table2": [
            base,
            refiner,
            denoiser("guidance", "guidance", "--evaluations", str(BUDGET), "--lr", "3e-4"),
            evaluate("guidance-distilled", "--lora", str(work / "guidance"), "--arms", "gaussian"),
        ],
        "table1": [
            invert,
            *compared("noise-loss", *inverted, "--epochs", "16", "--lr", "3e-4"),
        ],  # as many evaluations: each item takes two and not eight
        "table11": [
            Command(
                "train/experiments/inversion_error.py",
                ("--n", "40", "--output", str(work / "results" / "inversion.json")),
                work / "results" / "inversion.json",
                RESULTS / "inversion.json",
            )
        ],
        "table4": styled("clay") + styled("ink"),
        "table5": [
            refiner,
            denoiser(
                "consistency", "consistency", "--steps", "500", kept=LORAS / "emoji-turbo" / LORA
            ),
        ]
        + [
            evaluate(
                f"turbo-{steps}",
                "--backbone",
                "emoji-turbo",
                "--refiner",
                REFINER,
                "--arms",
                "gaussian",
                "refined",
                "--sampler",
                "Euler",
                "--steps",
                str(steps),
            )
            for steps in TURBO_STEPS
        ],
        "table10": [refiner, *compared("mlp", *shared, "--network", "mlp", "--lr", "3e-4")],
        "table12": [
            refiner,
            denoiser("images", "images", "--evaluations", str(BUDGET), "--lr", "3e-3"),
            evaluate("fine-tuned", "--lora", str(work / "images"), "--arms", "gaussian"),
        ],
        "table14": [refiner, *compared("scratch", *shared, "--network", "scratch")],
        "table15": [
            refiner,
            *compared("n5", *shared, "--steps", "5"),
            *compared("n10", *shared, "--steps", "10"),
        ],
        "parametrisation": [
            refiner,
            *compared("raw", *shared, "--network", "raw"),
            *compared("difference", *shared, "--network", "difference"),
        ],
        "seeds": [
            command
            for seed in (1, 2)
            for command in compared(f"seed{seed}", "--seed", str(seed * 10**7))
        ],
        "longer": compared(
            "longer", "--num_targets", "11776", "--target_steps", "20", "--steps", "10"
        ),
        "strength": [
            evaluate(
                f"strength-{strength}",
                "--refiner",
                REFINER,
                "--strength",
                str(strength),
                "--arms",
                "refined",
            )
            for strength in STRENGTHS
        ],
        "steps": list(sampled("ddim", "DDIM", FEW_STEPS, ["gaussian", "guided", "refined"], n)),
        "samplers": [
            command
            for name, sampler in SAMPLERS_TRIED.items()
            for command in sampled(name, sampler, STEPS, ["gaussian", "refined"], n // 4)
        ],
        "novelty": [
            base,
            Command(
                "train.emoji.render",
                ("--output_dir", str(work / "pictures")),
                work / "pictures" / "judge_classes.npy",
            ),
            Command(
                "train/experiments/novelty.py",
                (
                    "--pictures",
                    str(work / "pictures"),
                    "--measured",
                    str(work / "results" / "base"),
                    "--output",
                    str(work / "results" / "novelty.json"),
                ),
                work / "results" / "novelty.json",
                RESULTS / "novelty.json",
            ),
        ],
        "gradients": [
            Command(
                "train/experiments/noise_gradients.py",
                (
                    "--output",
                    str(work / "results" / "gradients.json"),
                    "--plot",
                    str(RESULTS / "gradients.png"),
                ),
                work / "results" / "gradients.json",
                RESULTS / "gradients.json",
            )
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, default=Path("runs/paper"))
    parser.add_argument(
        "--only", nargs="+", choices=experiments(Path("x")), help="experiments; all if not given"
    )
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args()
    work = Path(
        os.path.relpath(args.work_dir, ROOT)
    )  # results record these paths: no place of one machine
    os.chdir(ROOT)
    chosen = experiments(work)
    for name in args.only or chosen:
        for command in chosen[name]:
            if args.list:
                print(f"{name}: {command.script} {shlex.join(command.options)}")
            else:
                command.run()
    if not args.list:
        subprocess.run([sys.executable, "train/experiments/report.py"], check=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{shlex.join(map(str, error.cmd))} failed; the same command goes on from there.")
