"""Reproduce the paper's tables and figures in miniature, on the embedded models.

    python train/experiments/reproduce.py --work_dir runs/paper    # all of it: days on a CPU
    python train/experiments/reproduce.py --work_dir runs/paper --only table1 table5
    python train/experiments/reproduce.py --list

Every experiment is a few commands of this folder. A command whose result exists is not run again,
so the same command continues where it stopped: JSON files are kept in assets/results/paper, LoRAs
and judges that are shipped in their places, everything else under --work_dir. With another embedded
model, remove them first. The pictures of the style clay need assets/ of the npm package
@lobehub/fluent-emoji-3d as WORK_DIR/fluent. At the end train/experiments/report.py writes
assets/results/paper/report.md.
"""

import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from noiserefine.checkpoint import WEIGHTS_NAME
from noiserefine.guiders import GUIDERS
from train.common import ROOT, argument_parser
from train.options import PRESETS, Options, plan

RESULTS = ROOT / "assets" / "results" / "paper"
REFINER = "assets/refiners/emoji"
TURBO = "assets/loras/emoji-turbo"
LORAS = ROOT / "assets" / "loras"
NETWORKS = {  # compared with the refiner
    "mlp": "train.experiments.networks:Mlp",
    "scratch": "train.experiments.networks:Scratch",
    "raw": "train.experiments.networks:Raw",
    "difference": "train.experiments.networks:Difference",
}
NOISE_LOSS = "train.experiments.losses:NoiseLoss"
# Tried in a quarter of each training, by the experiment "tuning"; the best are used below, and
# 1e-3 where none is named.
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
SAMPLERS_TRIED = {  # beside DDIM, by the name of their results
    "dpm2m": "DPM++ 2M",
    "dpmsde": "DPM++ SDE",
    "euler": "Euler",
    "heunedm": "Heun (EDM)",
}
SIT_PROMPTS = "assets/prompts/emoji_objects.txt"
MODELS = {  # that whole methods are compared on, and the options that they need
    "emoji": "",
    "emoji-flow": "",
    "emoji-sit": f"--prompts {SIT_PROMPTS}",
}
VARIETY_SEEDS = 16
TEACHERS = [name for name in GUIDERS if name != "cfg"]
STEPS, FEW_STEPS, TURBO_STEPS = (10, 20, 50), (4, 6, 10, 14), (1, 2, 4)
STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5)
EPOCHS = PRESETS["emoji"]["epochs"]
# The noise loss takes two evaluations an item and not six: as many as the refiner's in three times
# its epochs.
NOISE_EPOCHS = 3 * EPOCHS
# Network evaluations of the refiner's training, after its targets.
BUDGET = plan(Options(**PRESETS["emoji"]))[1]["training"]


@dataclass(frozen=True)
class Command:
    """A script, its options, and the file whose existence means that it has run."""

    script: str
    options: tuple[str, ...]
    result: Path
    copy: Path | None = None  # in the repository

    def run(self) -> None:
        """Run the script, unless its result or the copy exists, and copy the result."""
        if self.copy and self.copy.exists():
            return
        if not self.result.exists():
            words = [sys.executable, self.script, *self.options]
            print("$", shlex.join(words[1:]), flush=True)
            self.result.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.mkdir(parents=True, exist_ok=True)
            subprocess.run(words, check=True)
        if self.copy:
            self.copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.result, self.copy)
            # The first images of each arm, which evaluate.py writes.
            for row in self.result.with_suffix("").glob("*.webp"):
                shutil.copy(row, self.copy.with_name(f"{self.copy.stem}-{row.name}"))


class Commands:
    """The commands of the experiments. Options are given as on a command line."""

    def __init__(self, work: Path, n: int = 1000):
        self.work, self.n, self.results = work, n, work / "results"
        # The shipped refiner's targets, made again by the run "refiner", and inverted noise.
        self.shared = f"--targets_of {shlex.quote(str(work / 'refiner'))}"
        self.inverted = f"--loss {NOISE_LOSS} --targets_of {shlex.quote(str(work / 'inverted'))}"
        self.base = self.evaluate(
            "base", f"--refiner {REFINER} --arms gaussian guided refined refined_guided"
        )
        self.refiner = self.train("refiner")
        # One step, for its targets, which hold the inverted noise.
        self.inversions = self.train("inverted", f"--loss {NOISE_LOSS} --epochs 0.01")
        guidance = f"--loss guidance --evaluations {BUDGET} --lr 3e-4"
        self.guidance = self.denoiser("guidance", guidance)
        turbo = ROOT / TURBO / WEIGHTS_NAME
        self.consistency = self.denoiser("consistency", "--loss consistency --steps 500", turbo)

    def train(self, name: str, options: str = "", copy: Path | None = None) -> Command:
        """Train a refiner on the embedded model."""
        folder = self.work / name
        words = ("--preset", "emoji", *shlex.split(options), "--output_dir", str(folder))
        return Command("train/train_refiner.py", words, folder / "refiner.json", copy)

    def evaluate(self, name: str, options: str, n: int | None = None) -> Command:
        """Measure arms."""
        result = self.results / f"{name}.json"
        words = (*shlex.split(options), "--n", str(n or self.n), "--output", str(result))
        return Command("train/evaluate.py", words, result, RESULTS / result.name)

    def denoiser(self, name: str, options: str, copy: Path | None = None) -> Command:
        """Train a LoRA on the denoiser itself."""
        folder, targets = self.work / name, str(self.work / "refiner")
        words = ("--targets", targets, *shlex.split(options), "--output_dir", str(folder))
        return Command("train/experiments/denoiser_lora.py", words, folder / WEIGHTS_NAME, copy)

    def evaluate_denoiser(self, name: str, trained: str, n: int | None = None) -> Command:
        """Measure what `denoiser` trained, unguided."""
        lora = shlex.quote(str(self.work / trained))
        return self.evaluate(name, f"--lora {lora} --arms gaussian", n)

    def compare(self, name: str, options: str, network: str | None = None) -> list[Command]:
        """Train with other options, and measure the result."""
        loader = f"--network {NETWORKS[network]}" if network else ""
        refiner = shlex.quote(str(self.work / name))
        return [
            self.train(name, f"{options} {loader}"),
            self.evaluate(name, f"--refiner {refiner} --arms refined {loader}"),
        ]

    def tune(self) -> Iterator[Command]:
        """Train a quarter of each training with every learning rate."""
        for lr in LEARNING_RATES:
            for network in ("lora", "mlp", "scratch"):
                name = f"tuning-{network}-{lr}"
                options = f"{self.shared} --network {NETWORKS.get(network, network)}"
                yield self.train(
                    name, f"{options} --epochs {EPOCHS / 4:g} --lr {lr}", RESULTS / f"{name}.json"
                )
            name = f"tuning-noise-{lr}"
            options = f"{self.inverted} --epochs {NOISE_EPOCHS / 4:g} --lr {lr}"
            yield self.train(name, options, RESULTS / f"{name}.json")
            for loss in ("guidance", "images"):
                name = f"tuning-{loss}-{lr}"
                yield self.denoiser(name, f"--loss {loss} --evaluations {BUDGET // 4} --lr {lr}")
                yield self.evaluate_denoiser(name, name, self.n // 4)

    def style(self, name: str) -> list[Command]:
        """Render a style, fine-tune and train a judge on it, measure with the base's refiner."""
        pictures, lora = self.work / name / "pictures", LORAS / f"emoji-{name}"
        judge = ROOT / f"train/emoji/classifier-{name}.safetensors"
        folder, fluent = shlex.quote(str(pictures)), shlex.quote(str(self.work / "fluent"))
        render = f"--style {name} --artwork {fluent} --per_object 60 --held_out_per_pair 4"
        train_judge = (
            f"--pictures {folder} --checkpoint {folder}/judge.pt --steps 500 --lr 1e-3 "
            "--start_from train/emoji/classifier.safetensors"
        )
        return [
            self._script("emoji/render", f"{render} --output_dir {folder}", self._rendered(name)),
            self._script(
                "emoji/style",
                f"--pictures {folder} --output_dir {shlex.quote(str(lora))}",
                lora / WEIGHTS_NAME,
            ),
            self._script(
                "emoji/classifier", f"{train_judge} --output {shlex.quote(str(judge))}", judge
            ),
            self.evaluate(
                f"emoji-{name}",
                f"--backbone emoji-{name} --refiner {REFINER} "
                f"--metrics judge={judge.relative_to(ROOT)}",
            ),
        ]

    def turbo(self) -> list[Command]:
        """Train a few-step model, and measure the base's refiner on it."""
        options = f"--lora {TURBO} --refiner {REFINER} --arms gaussian refined"
        return [
            self.consistency,
            *(
                self.evaluate(f"turbo-{steps}", f"{options} --sampler Euler --steps {steps}")
                for steps in TURBO_STEPS
            ),
        ]

    def figures(self, script: str, name: str, options: str) -> Command:
        """Run an experiment that writes a JSON file."""
        result = self.results / f"{name}.json"
        words = (*shlex.split(options), "--output", str(result))
        return Command(f"train/experiments/{script}.py", words, result, RESULTS / result.name)

    def on_each_model(self, script: str, n: int, **options: str) -> list[Command]:
        """Compare whole methods on every embedded model; options: those of one, by its name."""
        return [
            self.figures(
                script,
                f"{script}-{name}",
                f"--backbone assets/{name} --refiner assets/refiners/{name} --n {n} {own} "
                + options.get(name.replace("-", "_"), ""),
            )
            for name, own in MODELS.items()
        ]

    def study(self) -> list[Command]:
        """Vary the training recipe of every model."""
        return [self.figures("study", f"study-{name}", f"--preset {name}") for name in MODELS]

    def frontier(self) -> list[Command]:
        """Measure quality by forwards, beside LoRAs that are trained for it."""
        distilled = shlex.quote(str(self.work / "guidance"))
        return [
            self.refiner,
            self.guidance,
            self.consistency,
            *self.on_each_model(
                "frontier",
                self.n,
                emoji=f"--distilled {distilled} --few_step {TURBO}",
                emoji_sit=f"--tuning_prompts {SIT_PROMPTS}",
            ),
        ]

    def variety(self) -> list[Command]:
        """Measure quality against the variety among seeds."""
        return [
            self.consistency,
            *self.on_each_model(
                "variety",
                math.ceil(self.n / VARIETY_SEEDS) * VARIETY_SEEDS,
                emoji=f"--few_step {TURBO}",
            ),
        ]

    def compatibility(self) -> list[Command]:
        """Measure refined noise with what else people do to a model."""
        loras = " ".join(
            f"--lora assets/loras/emoji-{style} judge=train/emoji/classifier-{style}.safetensors"
            for style in ("clay", "ink")
        )
        against = '--negative_prompt "a blue background" --cache 0.1'
        sizes = "--sizes 64x64 64x128 128x64 128x256 192x192 256x256"
        every = f"{sizes} {against}"
        return self.on_each_model(
            "compatibility", self.n, emoji=f"{loras} {every}", emoji_flow=every, emoji_sit=every
        )

    def novelty(self) -> list[Command]:
        """Render the training pictures again and measure how near images are to them."""
        pictures = shlex.quote(str(self.work / "pictures"))
        measured = shlex.quote(str(self.results / "base"))
        rendered = self.work / "pictures" / "judge_classes.npy"
        return [
            replace(self.base, copy=None),  # the images' features, which are not in the copy
            self._script("emoji/render", f"--output_dir {pictures}", rendered),
            self.figures("novelty", "novelty", f"--pictures {pictures} --measured {measured}"),
        ]

    def failures(self) -> Command:
        """Show where the shipped refiner fails."""
        page = shlex.quote(str(RESULTS.parent / "failures.md"))
        words = f"--refiner {REFINER} --page {page}"
        result = self.results / "failures.json"
        return self._script(
            "experiments/failures", f"{words} --output {shlex.quote(str(result))}", result
        )

    def _rendered(self, name: str) -> Path:
        return self.work / name / "pictures" / "judge_classes.npy"

    def _script(self, script: str, options: str, result: Path) -> Command:
        return Command(f"train/{script}.py", tuple(shlex.split(options)), result)


def experiments(work: Path, n: int = 1000) -> dict[str, list[Command]]:
    """Return the commands of each experiment, in an order in which they can be run."""
    make = Commands(work, n)
    refiner, shared, inverted = make.refiner, make.shared, make.inverted
    return {
        "base": [make.base],
        "tuning": [refiner, make.inversions, *make.tune()],
        "table2": [
            make.base,
            refiner,
            make.guidance,
            make.evaluate_denoiser("guidance-distilled", "guidance"),
        ],
        "table1": [
            make.inversions,
            *make.compare("noise-loss", f"{inverted} --epochs {NOISE_EPOCHS:g} --lr 3e-4"),
        ],
        "table11": [make.figures("inversion_error", "inversion", "--n 40")],
        "table4": make.style("clay") + make.style("ink"),
        "table5": [refiner, *make.turbo()],
        "table10": [refiner, *make.compare("mlp", f"{shared} --lr 3e-4", "mlp")],
        "table12": [
            refiner,
            make.denoiser("images", f"--loss images --evaluations {BUDGET} --lr 3e-3"),
            make.evaluate_denoiser("fine-tuned", "images"),
        ],
        "table14": [refiner, *make.compare("scratch", shared, "scratch")],
        "table15": [
            refiner,
            *make.compare("n5", f"{shared} --steps 5"),
            *make.compare("n10", f"{shared} --steps 10"),
        ],
        "parametrisation": [
            refiner,
            *make.compare("raw", shared, "raw"),
            *make.compare("difference", shared, "difference"),
        ],
        "seeds": [
            *make.compare("seed1", "--seed 10000000"),
            *make.compare("seed2", "--seed 20000000"),
        ],
        "longer": make.compare("longer", "--num_targets 14336 --target_steps 20 --steps 10"),
        "teachers": [
            command
            for teacher in TEACHERS
            for command in make.compare(f"teacher-{teacher}", f"--teacher {teacher}")
        ],
        "strength": [
            make.evaluate(
                f"strength-{strength}",
                f"--refiner {REFINER} --strength {strength} --arms refined",
            )
            for strength in STRENGTHS
        ],
        "steps": [
            make.evaluate(
                f"ddim-{steps}",
                f"--refiner {REFINER} --steps {steps} --arms gaussian guided refined",
            )
            for steps in FEW_STEPS
        ],
        "samplers": [
            make.evaluate(
                f"{name}-{steps}",
                f"--refiner {REFINER} --sampler {shlex.quote(sampler)} --steps {steps} "
                "--arms gaussian refined",
                n // 4,
            )
            for name, sampler in SAMPLERS_TRIED.items()
            for steps in STEPS
        ],
        "study": make.study(),
        "frontier": make.frontier(),
        "variety": [refiner, *make.variety()],
        "compatibility": make.compatibility(),
        "novelty": make.novelty(),
        "failures": [make.failures()],
        "gradients": [
            make.figures(
                "noise_gradients",
                "gradients",
                f"--plot {shlex.quote(str(RESULTS / 'gradients.png'))}",
            )
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    """Run or list the experiments, then write the report."""
    parser = argument_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/paper"))
    parser.add_argument(
        "--only", nargs="+", choices=experiments(Path("x")), help="experiments; all if not given"
    )
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args(arguments)
    work = Path(os.path.relpath(args.work_dir, ROOT))  # results record relative paths
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
        command = shlex.join(map(str, error.cmd))
        sys.exit(f"{command} failed; run the same command again to continue from there.")
