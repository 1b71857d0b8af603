"""Refiner files that are damaged, by chance or on purpose."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from noiserefine import Refiner
from noiserefine.models.loading import load_pipeline
from noiserefine.models.user_lora import add_lora
from tests.conftest import EMOJI, EMOJI_REFINER, output
from tests.tools.stress.figure import Count, Figure, equality, print_errors

SOUND = Path(f"{EMOJI_REFINER}-scales")
WEIGHTS, SCALE_INPUT = "pytorch_lora_weights.safetensors", "guidance_embedding.safetensors"
SHORTEST_SENTENCE = 20
BAD_JSON = ["", "{", "[]", "null", "1", "[" * 10**5, '"x"', "{}", '{"rank": 1}', "\0"]
BAD_VALUES = [None, -1, 0, 1.5, 10**30, "x", "../..", [], {}, [[]], True, float("nan")]
BAD_NAMES = [
    *("../" * 30 + "etc", "a b", "a/b/c", "ü/ü", "x" * 5000, "a/\0", "--help"),
    *("somebody/some..thing", "/dev/null", "-"),
]


def refiners(count: Count) -> Iterator[Figure]:
    """Damage a sound refiner; reading it must give a refusal in words, or a refiner."""
    pipe = load_pipeline(EMOJI, "cpu")
    before, chance = output(pipe), random.Random(0)
    unforeseen: list[str] = []
    refused = 0
    with tempfile.TemporaryDirectory() as parent:
        canary = Path(parent) / "executed"
        for number in range(count(300)):
            folder = Path(parent) / f"refiner{number}"
            shutil.copytree(SOUND, folder)
            name = _damaged(folder, chance, canary)
            for load in (Refiner.from_pretrained, lambda name, pipe: add_lora(pipe, name)):
                try:
                    load(name, pipe)
                except (ValueError, FileNotFoundError) as error:
                    refused += len(str(error)) > SHORTEST_SENTENCE
                except Exception as error:  # noqa: BLE001 (counted)
                    unforeseen.append(f"{type(error).__name__}: {error}")
                pipe.unload_lora_weights()
            shutil.rmtree(folder)
        written = list(Path(parent).iterdir())
    print_errors(unforeseen)
    yield Figure("damaged ones, each read as refiner and as LoRA", count(300), "300", True)
    enough = refused > count(300)
    yield Figure("readings refused with a sentence", refused, "more than half", enough)
    yield Figure("errors that nobody foresaw", len(unforeseen), "0", not unforeseen)
    yield Figure("files written, by executed code for one", len(written), "0", not written)
    yield equality("the pipeline's output is unchanged", torch.equal(output(pipe), before))


class _Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


def _damaged(folder: Path, chance: random.Random, canary: Path) -> str:
    """Damage the refiner in a random way; return the name to load."""
    damages: list[Callable[[], object]] = [
        lambda: _damage_bytes(folder, chance),
        lambda: _damage_tensors(folder, chance),
        lambda: _damage_config(folder, chance),
        lambda: _damage_kind(folder, chance, canary),
    ]
    if chance.random() < 1 / 13:
        return chance.choice(BAD_NAMES)
    chance.choice(damages)()
    return str(folder)


def _damage_bytes(folder: Path, chance: random.Random) -> None:
    """Cut or empty a file, or change one byte."""
    file = folder / chance.choice([WEIGHTS, SCALE_INPUT])
    data = bytearray(file.read_bytes())
    kind = chance.choice(["cut", "empty", "flip"])
    if kind == "flip":
        data[chance.randrange(min(len(data), 4000))] ^= chance.randrange(1, 256)
    else:
        del data[chance.randrange(len(data)) if kind == "cut" else 0 :]
    file.write_bytes(data)


def _damage_tensors(folder: Path, chance: random.Random) -> None:
    """Remove or add a tensor, or change its shape, type or values."""
    state = load_file(folder / WEIGHTS)
    name = chance.choice(list(state))
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "shape": torch.flatten,
        "dtype": lambda tensor: tensor.to(torch.int64),
        "nan": lambda tensor: torch.full_like(tensor, torch.nan),
    }
    kind = chance.choice([*changes, "missing", "extra"])
    if kind in changes:
        state[name] = changes[kind](state[name])
    elif kind == "missing":
        del state[name]
    else:
        state[f"{name}.more"] = torch.zeros(2)
    save_file(state, folder / WEIGHTS)


def _damage_config(folder: Path, chance: random.Random) -> None:
    """Replace the configuration, or one value of it, or let it point out of its folder."""
    file = folder / "refiner.json"
    config = json.loads(file.read_text())
    kind = chance.choice(["text", "value", "climb"])
    if kind == "text":
        file.write_text(chance.choice(BAD_JSON))
    elif kind == "value":
        config[chance.choice(list(config))] = chance.choice(BAD_VALUES)
        file.write_text(json.dumps(config))
    else:
        config["base_model"] = "../../../etc/passwd"
        config["architecture"] = {"../x": "/etc/passwd"}
        file.write_text(json.dumps(config))


def _damage_kind(folder: Path, chance: random.Random, canary: Path) -> None:
    """Replace a file by a pickle that executes code, or by a link out of the folder."""
    file = folder / chance.choice([WEIGHTS, SCALE_INPUT])
    file.unlink()
    if chance.random() < 0.5:
        for name in (file.name, f"{file.stem}.bin"):
            torch.save(_Payload(canary), folder / name)
    else:
        file.symlink_to("/dev/zero" if chance.random() < 0.01 else "/etc/passwd")
