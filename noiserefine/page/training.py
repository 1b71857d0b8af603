"""A training in a process of its own: its command, its start and end, and what its folder tells.

The page does not import the trainer: it starts the script and reads the files that it writes.
"""

import functools
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noiserefine.models.catalogue import ASSETS, BACKBONES
from noiserefine.page.lazy import Lazy
from noiserefine.page.settings import Settings, text, whole

refiners: Any = Lazy("noiserefine.models.refiners")
devices: Any = Lazy("noiserefine.models.devices")

ROOT = ASSETS.parent
TRAINER = Path("train", "train_refiner.py")  # from ROOT
OUTPUT = "output.txt"  # what the trainer says, in the folder of the run
STEP_FORWARDS = 2  # refining and the backward pass, beside the unguided steps
SIZES: dict[str, dict[str, Any]] = {  # options of the trainer
    "demonstration": {
        "quick": True,
        "num_targets": 128,
        "target_steps": 6,
        "steps": 3,
        "epochs": 2,
        "lr": 5e-4,
        "target_batch_size": 16,
        "num_validation": 8,
        "validate_every": 4,
    },
    "quick": {"quick": True},
    "full": {},
}
MORE_STEPS = {"batch_size": 16}  # of the demonstration on an embedded model


@dataclass(frozen=True)
class Plan:
    """A training that the page can start."""

    backbone: str  # as the page names it
    arguments: tuple[str, ...]  # of the trainer
    folder: Path  # of the run and its refiner

    @property
    def command(self) -> str:
        """Return the line that starts it in a shell, from the root of the repository."""
        return shlex.join(["python", str(TRAINER), *self.arguments])

    @property
    def is_trained(self) -> bool:
        """Return whether the refiner is complete."""
        return (self.folder / "refiner.json").is_file()


def plan_of(settings: Settings, size: str, targets: float | None = 0, prompts: str = "") -> Plan:
    """Return how the trainer is started for the chosen model.

    size: a key of SIZES. targets: their number, 0 for the size's. prompts: a file, from which
    the validation's are taken too, "" for the preset's.
    Raise ValueError or OSError for a model that cannot be named or read.
    """
    source = settings.model.backbone
    if listed := BACKBONES.get(source):
        base = refiners.base_of(listed)
        name = next(name for name, entry in BACKBONES.items() if entry == base)
        source, preset = base.source, base.preset
        embedded = not base.download
        if Path(source).is_relative_to(ROOT):
            source = str(Path(source).relative_to(ROOT))
    else:
        preset, embedded = refiners.preset_of(source), False
        name = _slug(source)
    options = {"preset": preset} | SIZES[size] | {"backbone": source}
    if embedded and size == "demonstration":
        options |= MORE_STEPS
    if not embedded and devices.default_device().type == "cpu":
        options["mixed_precision"] = "no"
    if targets:
        options["num_targets"] = whole(targets, "The number of targets")
        name += f"-{options['num_targets']}"
    if prompts := text(prompts, "The file of prompts").strip():
        name += "-" + _slug(prompts)
        file = str(Path(prompts).expanduser())
        options |= {"prompts": file, "validation_prompts": file}
    folder = Path("runs", f"{name}-{size}")
    options["output_dir"] = folder
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return Plan(settings.backbone, tuple(arguments), ROOT / folder)


@functools.lru_cache
def cost(plan: Plan) -> str:
    """Return what the trainer's --dry_run says, which takes seconds."""
    done = subprocess.run(
        [sys.executable, str(TRAINER), *plan.arguments, "--dry_run"],
        cwd=ROOT,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return last_sentence(done.stderr) if done.returncode else done.stdout.strip()


class Run:
    """The process of a training."""

    def __init__(self, plan: Plan, script: Path = TRAINER) -> None:
        """Start or continue the training."""
        self.plan, self.stopped = plan, False
        plan.folder.mkdir(parents=True, exist_ok=True)
        with (plan.folder / OUTPUT).open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "noiserefine.page.child", str(script), *plan.arguments],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it once, by the end of its input
            )

    def wait(self, seconds: float) -> bool:
        """Wait for the end, at most so long; return whether the process has ended."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """Ask the process to write its checkpoint and end."""
        self.stopped = True
        assert self.process.stdin
        self.process.stdin.close()

    def failure(self) -> str:
        """Return in a sentence why the ended process made no refiner; "" if it made one."""
        code = self.process.returncode
        if code == 0:
            return ""
        if self.stopped:
            return "Stopped. Start continues from here."
        if code < 0:
            return f"The trainer was ended by signal {-code}; the memory may have been full."
        output = (self.plan.folder / OUTPUT).read_text(encoding="utf-8", errors="replace")
        return last_sentence(output)


class Training:
    """The page's trainings, of which one runs at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: Run | None = None

    @property
    def run(self) -> Run | None:
        """Return the training that runs, if any."""
        return self._last if self._last and not self._last.wait(0) else None

    def start(self, plan: Plan, script: Path = TRAINER) -> Run:
        """Start or continue a training. Raise ValueError while one runs."""
        with self._lock:
            if self.run:
                raise ValueError(
                    f"A training runs already, in {shown(self.run.plan.folder)}: wait for its "
                    "end, or press Stop in the Train tab."
                )
            self._last = Run(plan, script)
            return self._last


@dataclass(frozen=True)
class Progress:
    """How far a run is, as its folder tells."""

    doing: str  # "targets" or "step"
    done: int
    total: int
    work: float  # forwards done of all, from 0 to 1
    curve: tuple[tuple[int, float], ...]  # validations: step, percent of the way to guided
    sheet: Path | None  # the newest picture of held-out prompts


def read_progress(folder: Path) -> Progress | None:
    """Return how far a run is; None before its model is loaded."""
    if not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    targets, per_step = config["num_targets"], config["effective_batch"]
    total = max(1, round(config["epochs"] * targets / per_step))
    files = len(list((folder / "targets").glob("*.safetensors")))
    made = min(targets, files * config["target_batch_size"])
    log = _read_lines(folder / "stats.jsonl")

    arms = 1 + (config["guidance_scale"] > 1) + (config["pag_scale"] > 0)
    per_target = arms * config["target_steps"]
    per_step *= config["steps"] + STEP_FORWARDS
    work = made * per_target + len(log) * per_step
    work /= targets * per_target + total * per_step

    validated = [line for line in log if "validation_percent" in line]
    curve = [(0, 0.0), *((int(line["step"]), line["validation_percent"]) for line in validated)]
    sheet = folder / "validation" / f"{curve[-1][0]:07d}.png"
    complete = (folder / "targets").is_dir() and sheet.is_file()  # the first sheet comes before
    if log or made == targets:
        doing, done = "step", len(log)
    else:
        doing, done, total = "targets", made, targets
    return Progress(doing, done, total, work, tuple(curve), sheet if complete else None)


class Clock:
    """Estimates the seconds that remain from the work done since it was started."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None

    def remaining(self, work: float) -> float | None:
        """Return the seconds for the rest, where work goes from 0 to 1; None before any is done."""
        now = time.monotonic()
        if self.first is None:
            self.first = now, work
        began, before = self.first
        return None if work <= before else (now - began) / (work - before) * (1 - work)


def last_sentence(output: str) -> str:
    """Return the last line of what a script said, without the name of the error's class."""
    lines = [line.strip() for line in re.split(r"[\r\n]", output) if line.strip()]
    return re.sub(r"^\w+: ", "", lines[-1]) if lines else "The trainer ended without a word."


def _slug(name: str) -> str:
    """Return a folder's name for a path or hub id: its last part, and a hash of the whole."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return "-".join([*re.findall(r"[\w.]+", Path(name).stem), digest])


def _read_lines(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shown(folder: Path) -> str:
    """Return a folder, relative to the repository if it is in it."""
    return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)


def _environment() -> dict[str, str]:
    """Return the environment in which the trainer finds the packages of this checkout."""
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *([before] if before else [])])}
