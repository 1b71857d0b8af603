"""Run the measurements of a graphics card, the most valuable first, each for a limited time.

    bash tests/tools/cuda.sh OUT                        # everything, TOTAL_SECONDS (480) at most
    bash tests/tools/cuda.sh OUT --only sdxl            # some parts
    bash tests/tools/cuda.sh OUT --small                # small architectures, on the processor too

Every result is in OUT/cuda.json as soon as it is there, so a run that is cut off still tells what
it came to; parts that are run again replace their results, the others stay.  OUT/cuda.log has all
output.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from results import MARK

FOLDER = Path(__file__).resolve().parent
TOTAL_SECONDS = 480.0
LEAST_SECONDS = 10.0  # no part is started for less
SLOWER = 4  # than a card, the processor with small architectures
TAIL = 1500  # characters of a failed part's output in the JSON
# Name -> seconds at most, and the script with its arguments.
PARTS: dict[str, tuple[float, list[str]]] = {
    "environment": (30, ["environment.py"]),
    "suite": (90, ["suite.py"]),
    "page": (70, ["page.py"]),
    "sd21": (80, ["arms.py", "sd21"]),
    "sdxl": (120, ["arms.py", "sdxl"]),
    "train-sd21": (40, ["training.py", "sd21"]),
    "train-sdxl": (70, ["training.py", "sdxl"]),
    "sd35-medium": (90, ["arms.py", "sd35-medium"]),
    "train-sd35-medium": (60, ["training.py", "sd35-medium"]),
    "tiers-sd21": (60, ["tiers.py", "sd21"]),
    "tiers-sdxl": (90, ["tiers.py", "sdxl"]),
    "tiers-sd35-medium": (60, ["tiers.py", "sd35-medium"]),
    "train-sit": (30, ["training.py", "sit"]),
    "sana": (50, ["arms.py", "sana"]),
    "compile-sd21": (80, ["compiled.py", "sd21"]),
    "train-sana": (40, ["training.py", "sana"]),
    "train-sd15": (30, ["training.py", "sd15"]),
    "train-pixart-sigma": (40, ["training.py", "pixart-sigma"]),
    "train-klein": (45, ["training.py", "klein"]),
    "train-z-image": (60, ["training.py", "z-image"]),
    "compile-sdxl": (90, ["compiled.py", "sdxl"]),
    "sit": (40, ["arms.py", "sit"]),
    "klein": (60, ["arms.py", "klein"]),
    "z-image": (60, ["arms.py", "z-image"]),
}


class Record:
    """OUT/cuda.json, rewritten after every change, and OUT/cuda.log."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log = (
            folder / "cuda.json",
            (folder / "cuda.log").open("a", encoding="utf-8"),
        )
        self.parts: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.parts = json.loads(self.path.read_text(encoding="utf-8"))["parts"]

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"parts": self.parts}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def run_part(name: str, command: list[str], limit: float, record: Record) -> None:
    """Run a part in a process of its own, ended with all that it started after `limit` seconds."""
    entry = record.parts[name] = {"status": "running", "limit": round(limit), "results": {}}
    record.write()
    began, output, timed_out = time.monotonic(), [], threading.Event()
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / command[0]), *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def end() -> None:
        timed_out.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, end)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        record.log.write(line)
        record.log.flush()
        _, mark, result = line.partition(MARK)  # behind pytest's dots, too
        if mark:
            entry["results"] |= json.loads(result)
            record.write()
        else:
            output.append(line)
    status = process.wait()
    timer.cancel()
    entry["seconds"] = round(time.monotonic() - began, 1)
    entry["status"] = "timed out" if timed_out.is_set() else "done" if status == 0 else "failed"
    if entry["status"] != "done":
        entry["output"] = "".join(output)[-TAIL:]
    record.write()
    print(f"{name}: {entry['status']} after {entry['seconds']} s", json.dumps(entry["results"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for cuda.json and cuda.log")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="small architectures, on any device")
    args = parser.parse_args()
    record = Record(args.out)
    ends = time.monotonic() + float(os.environ.get("TOTAL_SECONDS", TOTAL_SECONDS))
    least = float(os.environ.get("LEAST_SECONDS", LEAST_SECONDS))
    for name in args.only:
        limit, command = PARTS[name]
        left = ends - time.monotonic()
        if left < least:
            record.parts[name] = {"status": "not started: no time left"}
            record.write()
            continue
        small = ["--small"] if args.small else []
        limit = SLOWER * limit if args.small else limit
        run_part(name, [*command, *small], min(limit, left), record)
    counts = [part["status"] for part in record.parts.values()]
    print({status: counts.count(status) for status in sorted(set(counts))})


if __name__ == "__main__":
    main()
