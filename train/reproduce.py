"""The paper's tables and figures in miniature, on the embedded model: trains, measures and reports.

    python train/reproduce.py --work_dir runs/paper                # all of it, in hours; goes on where it stopped
    python train/reproduce.py --work_dir runs/paper --only table1 table5
    python train/reproduce.py --list

Every experiment is a few commands of this folder.  A command whose result is there is not run again: JSON files are kept
in assets/results/paper, everything else under --work_dir.  At the end train/report.py writes assets/results/paper/report.md.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "assets" / "results" / "paper"
REFINER = "assets/refiners/emoji"
BUDGET = 1152 * 8 * 12  # network evaluations that the refiner's training takes after its targets: (1 + N + 1) of each item seen


@dataclass(frozen=True)
class Command:
    """A script of this folder and the file that it leaves, which means that it is done."""

    script: str
    options: tuple[str, ...]
    result: Path
    kept: str = ""  # the name in RESULTS of a result that is kept

    def run(self) -> None:
        if self.result.exists() or self.kept and (RESULTS / self.kept).exists():
            return
        words = [sys.executable, *(["-m", self.script] if "." in self.script and "/" not in self.script else [self.script]), *self.options]
        print("$", shlex.join(words[1:]), flush=True)
        self.result.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(words, cwd=ROOT, check=True)
        if self.kept:
            RESULTS.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.result, RESULTS / self.kept)


def experiments(work: Path, n: int = 1000) -> dict[str, list[Command]]:
    """The commands of each experiment, in an order in which they can be run."""
    def train(name: str, *options: str) -> Command:
        return Command("train/train_refiner.py", ("--preset", "emoji", *options, "--output_dir", str(work / name)), work / name / "refiner.json")

    def evaluate(name: str, *options: str, images: int = n) -> Command:
        result = work / "results" / f"{name}.json"
        return Command("train/evaluate.py", (*options, "--n", str(images), "--output", str(result)), result, f"{name}.json")

    def denoiser(loss: str, *options: str) -> Command:
        folder = work / loss
        return Command("train/denoiser_lora.py", ("--loss", loss, "--targets", str(work / "refiner"), *options, "--output_dir", str(folder)),
                       folder / "pytorch_lora_weights.safetensors")

    def compared(name: str, *options: str) -> list[Command]:
        """A run of the trainer with other options, and what its result does."""
        return [train(name, *options), evaluate(name, "--refiner", str(work / name), "--arms", "refined")]

    def sampled(samplers: list[str], steps: list[int], arms: list[str], images: int) -> Iterator[Command]:
        for sampler in samplers:
            for count in steps:
                name = f"{''.join(letter for letter in sampler.lower() if letter.isalnum())}-{count}"
                yield evaluate(name, "--refiner", REFINER, "--sampler", sampler, "--steps", str(count), "--arms", *arms, images=images)

    base = evaluate("base", "--refiner", REFINER, "--arms", "gaussian", "guided", "refined", "refined_guided")
    refiner = train("refiner")  # the shipped refiner again, for its targets
    return {
        "base": [base],
        "table2": [base, refiner, denoiser("guidance", "--evaluations", str(BUDGET)),
                   evaluate("guidance-distilled", "--lora", str(work / "guidance"), "--arms", "gaussian")],
        "table1": compared("noise-loss", "--loss", "noise"),
        "table11": [Command("train/inversion_error.py", ("--n", "100", "--output", str(work / "results" / "inversion.json")),
                            work / "results" / "inversion.json", "inversion.json")],
        "table4": [evaluate(style, "--backbone", style, "--refiner", REFINER, "--metrics", f"judge=train/emoji/classifier-{style[6:]}.safetensors")
                   for style in ("emoji-clay", "emoji-ink")],
        "table5": [evaluate(f"turbo-{steps}", "--backbone", "emoji-turbo", "--refiner", REFINER, "--arms", "gaussian", "refined", "--sampler", "Euler",
                            "--steps", str(steps)) for steps in (1, 2, 4)],
        "table10": compared("mlp", "--network", "mlp"),
        "table12": [refiner, denoiser("images", "--evaluations", str(BUDGET)),
                    evaluate("fine-tuned", "--lora", str(work / "images"), "--arms", "gaussian")],
        "table14": compared("scratch", "--network", "scratch"),
        "table15": compared("n5", "--steps", "5"),
        "parametrisation": compared("raw", "--network", "raw") + compared("difference", "--network", "difference"),
        "seeds": [command for seed in (1, 2) for command in compared(f"seed{seed}", "--seed", str(seed * 10**7))],
        "strength": [evaluate(f"strength-{strength}", "--refiner", REFINER, "--strength", str(strength), "--arms", "refined")
                     for strength in (0.25, 0.5, 0.75, 1.25, 1.5)],
        "steps": list(sampled(["DDIM"], [4, 6, 10, 14], ["gaussian", "guided", "refined"], n)),
        "samplers": list(sampled(["DPM++ 2M", "DPM++ SDE", "Euler", "Heun (EDM)"], [10, 20, 50], ["gaussian", "refined"], n // 4)),
        "gradients": [Command("train/noise_gradients.py", ("--output", str(work / "results" / "gradients.json"), "--plot", str(RESULTS / "gradients.png")),
                              work / "results" / "gradients.json", "gradients.json")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/paper"))
    parser.add_argument("--only", nargs="+", choices=experiments(Path("x")), help="experiments; all if not given")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args()
    chosen = experiments(args.work_dir)
    for name in args.only or chosen:
        for command in chosen[name]:
            if args.list:
                print(f"{name}: {command.script} {shlex.join(command.options)}")
            else:
                command.run()
    if not args.list:
        subprocess.run([sys.executable, "train/report.py"], cwd=ROOT, check=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{shlex.join(map(str, error.cmd))} failed; the same command goes on from there.")
