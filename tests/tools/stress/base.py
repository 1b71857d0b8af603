"""The pipeline after everything that visitors do to it."""

import hashlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from noiserefine.models.catalogue import Model
from noiserefine.page import jobs
from noiserefine.page.events import Made
from noiserefine.page.handlers import run_view
from noiserefine.page.settings import Settings
from noiserefine.page.stream import stream
from noiserefine.sampler_names import SAMPLERS
from tests.conftest import EMOJI_REFINER, ROOT, output
from tests.tools.stress.figure import Count, Figure, equality
from tests.tools.stress.server import PROMPT
from train.tools.architectures import random_pipeline

CONTROLS = {
    "compare": {},
    "strength": {},
    "two_prompts": {"other": "a panda"},
    "guided_from_refined": {},
    "refine": {},
    "trajectory": {},
    "attention": {"word": "apple"},
}
BAD = [
    {"prompt": ""},
    {"backbone": "nonsense"},
    {"strength": float("nan")},
    {"width": 65},
    {"sampler": "nonsense"},
    {"refiner": "nonsense"},
    {"lora": "nonsense"},
    {"guidance_scale": 99.0},
]


def base(count: Count) -> Iterator[Figure]:
    """Do random things in this process, then compare its output with a fresh process's."""
    chance = random.Random(0)
    ends = {"done": 0, "stopped": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as folder:
        models = _models(Path(folder))
        for _ in range(count(500)):
            known: dict = {}
            model = {} if chance.random() < 0.8 else chance.choice(models)
            for _ in range(chance.randint(1, 4)):
                view = chance.choice(list(CONTROLS))
                settings = _settings(chance, model)
                ends[_visit(chance, view, settings, known)] += 1
        list(stream(jobs.WORKER, lambda report: None))  # wait for the last stopped view
    yield Figure("random sequences", count(500), "500", True)
    for end, number in ends.items():
        yield Figure(f"views {end}", number, "some", number > 0)
    pipe = jobs.MODELS.get(Model("emoji")).pipe
    digest = hashlib.sha256(output(pipe).numpy().tobytes()).hexdigest()
    yield equality("output equal to a fresh process's", digest == _fresh_digest())


def _models(folder: Path) -> list[dict]:
    """Return settings of models beside the default one, some saved in the folder."""
    random_pipeline("sd-turbo", small=True).save_pretrained(folder / "other")
    return [
        {"backbone": str(folder / "other")},
        {"refiner": f"{EMOJI_REFINER}-scales"},
        {"lora": "assets/loras/emoji-clay"},
    ]


def _settings(chance: random.Random, model: dict) -> Settings:
    values = {
        "prompt": chance.choice([PROMPT, "an apple"]),
        "seed": chance.randrange(9),
        "steps": chance.choice([1, 2, 3]),
        "guidance_scale": chance.choice([2.5, 1.0]),
        "strength": chance.choice([1.0, 0.0, 0.5]),
        "sampler": chance.choice([*SAMPLERS]),
        "width": chance.choice([0, 0, 72]),
        "lora_weight": chance.choice([1.0, 0.5]),
        "negative_prompt": chance.choice(["", "blurry"]),
    }
    wrong = chance.choice(BAD) if chance.random() < 0.2 else {}
    return Settings(**values | model | wrong)


def _visit(chance: random.Random, view: str, settings: Settings, known: dict) -> str:
    """Run a view, which may be left at any event; return how it ended."""
    running = run_view(view, settings, CONTROLS[view], known)
    try:
        for events in running:
            for event in events:
                if isinstance(event, Made):
                    known[event.model, event.sample.recipe] = event.sample
            if chance.random() < 0.1:
                return "stopped"
        return "done"
    except gr.Error:
        return "refused"
    finally:
        running.close()


def _fresh_digest() -> str:
    """Return the digest of what a process that did nothing else makes."""
    code = (
        "import hashlib; from noiserefine.models.loading import load_pipeline; "
        "from tests.conftest import EMOJI, output; "
        "print(hashlib.sha256(output(load_pipeline(EMOJI, 'cpu')).numpy().tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.split()[-1]
