"""The settings of a run, and which of them may change when it is continued."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from noiserefine.checkpoint import same_weights
from train.common import UNFINISHED, write_json
from train.options import CONSTANT_LR, TARGET_OPTIONS, TRAINING_OPTIONS, Options, effective_batch

SETTINGS = "config.json"


def settings_of(
    options: Options, processes: int, prompts: list[str], **facts: Any
) -> dict[str, Any]:
    """Return what config.json records: the options and the facts that the result depends on.

    facts: the size in pixels and a few of the backbone's weights (`backbone_signature`).
    """
    return (
        {name: value for name, value in asdict(options).items() if name != "dry_run"}
        | facts
        | {
            "effective_batch": effective_batch(options, processes),
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        }
    )


def open_run(folder: Path, settings: dict[str, Any], main_process: bool) -> None:
    """Create or continue the run in a folder, and record its settings.

    Raise ValueError if the folder holds a run whose result would be another one, or if
    `--targets_of` names targets that these settings would not make.
    """
    if (folder / SETTINGS).exists():
        earlier = read_settings(folder)
        differing = _differences(earlier, settings, _target_settings(settings))
        differing += _differences(earlier, settings, _training_settings(earlier, settings))
        if differing:
            raise ValueError(
                f"{folder} holds another run ({'; '.join(differing)}): give the same options and "
                "files, or another --output_dir."
            )
    if settings["targets_of"]:
        check_targets_of(Path(settings["targets_of"]), settings)
    if main_process:
        for part in folder.glob(f"*{UNFINISHED}"):  # of a run that was killed while it wrote
            part.unlink()
        write_json(folder / SETTINGS, settings)


def check_targets_of(run: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if another run's targets are not those that these settings would make.

    It may have more of them: its first ones are the same. Raise FileNotFoundError if there is no
    such run.
    """
    if not (run / SETTINGS).is_file():
        raise FileNotFoundError(
            f"--targets_of {run} is no run of this script: it has no {SETTINGS}."
        )
    earlier = read_settings(run)
    names = _target_settings(settings) + ["loss"] * (settings["loss"] != "msd")
    if earlier["num_targets"] > settings["num_targets"]:
        names.remove("num_targets")
    if differing := _differences(earlier, settings, names):
        raise ValueError(
            f"The targets of {run} are others ({'; '.join(differing)}): give the same options, "
            "or leave --targets_of out."
        )


def read_settings(run: Path) -> dict[str, Any]:
    """Return a run's settings; an earlier version's lack newer options."""
    return asdict(Options()) | json.loads((run / SETTINGS).read_text())


def _target_settings(settings: dict[str, Any]) -> list[str]:
    names = [*TARGET_OPTIONS, "backbone_signature", "prompts_sha256"]
    # A range of scales has one scale for each sampling call.
    return names + ["target_batch_size"] * bool(settings["guidance_scale_range"])


def _training_settings(earlier: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    names = {*TRAINING_OPTIONS, "effective_batch"}
    longer = settings["epochs"] >= earlier["epochs"]
    if longer and settings["lr_schedule"] in CONSTANT_LR:
        names.remove("epochs")
    return sorted(names)


def _differences(
    earlier: dict[str, Any], settings: dict[str, Any], names: Iterable[str]
) -> list[str]:
    before, weights = earlier.get("backbone_signature"), settings["backbone_signature"]
    if before and same_weights(before, weights):  # another precision rounds them otherwise
        earlier = earlier | {"backbone_signature": weights}
    return [
        f"{name} was {earlier.get(name)!r}, now {settings[name]!r}"
        for name in names
        if earlier.get(name) != settings[name]
    ]
