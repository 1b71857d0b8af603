"""Prompts from files: text in any usual encoding, JSON lines, CSV, COCO annotations, Parquet."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas
from diffusers import DiffusionPipeline

from noiserefine.noise import check_prompt_length
from train.common import ROOT

HELD_OUT = "assets/prompts/emoji_heldout.txt"  # prompts the embedded model's refiner never saw
CAPTION_FIELDS = ("prompt", "text", "caption")  # in the order in which they are looked for
SHOWN_PROBLEMS = 5


def read_prompts(path: str | Path, pipe: DiffusionPipeline) -> list[str]:
    """Return the prompts of a file: a line each, or a record each of a .jsonl or .csv file.

    Raise FileNotFoundError if there is no such file, and ValueError if it holds no prompts or
    some that the model would cut off; the message lists all of them.
    """
    path = Path(path) if Path(path).is_file() else ROOT / path  # shipped prompts, from anywhere
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no prompt file {path}; it is a text file with one prompt a line."
        )
    prompts = [prompt for line in _captions(path) if (prompt := line.strip())]
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    if not any("tokenizer" in name for name in pipe.components):
        pipe.encode_prompt(prompts)  # class names: raises ValueError for an unknown one
    problems = {
        number: problem
        for number, prompt in enumerate(prompts, 1)
        if (problem := _problem(prompt, pipe))
    }
    if problems:
        numbers = list(problems)
        shown = ", ".join(map(str, numbers[:SHOWN_PROBLEMS]))
        more = f" and {len(numbers) - SHOWN_PROBLEMS} more" if len(numbers) > SHOWN_PROBLEMS else ""
        plural = "s" * (len(numbers) > 1)
        fitting = len(prompts) - len(problems)
        raise ValueError(
            f"{path}, prompt{plural} {shown}{more}: {problems[numbers[0]]} Of its {len(prompts)} "
            f"prompts {fitting} are short enough: leave the others out, or take a file of short "
            "ones, as assets/prompts/emoji.txt is."
        )
    return prompts


def fits(prompt: str, pipe: DiffusionPipeline) -> bool:
    """Return whether the model reads the whole prompt."""
    return not _problem(prompt, pipe)


def repeat_to(prompts: list[str], n: int) -> list[str]:
    """Return n prompts: a fixed shuffle of the given ones, taken in turns."""
    return np.resize(np.random.default_rng(0).permutation(prompts), n).tolist()


def chosen_prompts(path: str, n: int, pipe: DiffusionPipeline) -> list[str]:
    """Return n prompts of a prompt file or of COCO's annotations (.json), in turns.

    Raise FileNotFoundError or ValueError for a file or prompts that cannot be used. Captions that
    the model would cut off are left out.
    """
    if not path.endswith(".json"):
        return repeat_to(read_prompts(path, pipe), n)
    return repeat_to([caption for caption in coco_captions(Path(path)) if fits(caption, pipe)], n)


def held_out_prompts(n: int) -> list[str]:
    """Return n held-out prompts of the embedded model."""
    return repeat_to((ROOT / HELD_OUT).read_text(encoding="utf-8").splitlines(), n)


def coco_captions(path: Path) -> list[str]:
    """Return the first caption of each image of COCO's annotations.

    Raise ValueError for another file.
    """
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        return list(
            {entry["image_id"]: entry["caption"] for entry in reversed(annotations)}.values()
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a COCO caption file such as captions_train2014.json: {error!r}."
        ) from error


def pickapic_captions(paths: Iterable[Path]) -> list[str]:
    """Return the captions of Pick-a-Pic's Parquet files.

    Raise ValueError for files without a column "caption".
    """
    try:
        return [
            caption
            for path in paths
            for caption in pandas.read_parquet(path, columns=["caption"])["caption"]
        ]
    except ImportError as error:
        raise ValueError("Reading parquet files needs pyarrow: pip install pyarrow.") from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{', '.join(map(str, paths))}: not parquet files with a column “caption”: {error}."
        ) from error


def _captions(path: Path) -> list[str]:
    """Return the lines, or the records' captions where the first line is a record or a header."""
    text = _decode(path.read_bytes())
    first = next(iter(text.strip().splitlines()), "")
    if first.startswith("{") and first.endswith("}"):
        return _json_lines(path, text)
    if " " not in first and set(first.split(",")) & set(CAPTION_FIELDS):
        rows = csv.DictReader(io.StringIO(text.strip()))
        column = _caption_field(path, rows.fieldnames or ())
        return [row[column] or "" for row in rows]
    if path.suffix in (".csv", ".json", ".jsonl"):
        raise ValueError(
            f"{path} is not read as prompts: its first line is {first[:80]!r}. A .jsonl file has a "
            f"record a line, a .csv file a header, each with one of {', '.join(CAPTION_FIELDS)}."
        )
    return text.splitlines()


def _decode(data: bytes) -> str:
    """Decode UTF-16 by its byte-order mark, UTF-8 with or without one, else Windows' cp1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _json_lines(path: Path, text: str) -> list[str]:
    captions = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            captions.append(str(record[_caption_field(path, record)]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return captions


def _caption_field(path: Path, fields: Iterable[str]) -> str:
    for name in CAPTION_FIELDS:
        if name in fields:
            return name
    raise ValueError(
        f"{path} has no field {', '.join(CAPTION_FIELDS)}; its fields are {', '.join(fields)}."
    )


def _problem(prompt: str, pipe: DiffusionPipeline) -> str:
    try:
        check_prompt_length(pipe, prompt)
    except ValueError as error:
        return str(error)
    return ""
