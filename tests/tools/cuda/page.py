"""The page's server on the card: two comparisons, Stop, the same pixels after it."""

import hashlib
import importlib.util
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from results import arguments, report

ROOT = Path(__file__).resolve().parents[3]
# Prompt, seed, model, steps, guidance, strength, sampler, width, height, refiner, LoRA, weight.
SETTINGS = ["a red apple", 7, "emoji", 20, 2.5, 1.0, "DDIM", 0, 0, "", "", 1.0]
MANY_STEPS = 200


def start() -> tuple[subprocess.Popen, str]:
    """Return the server's process and its address, once it listens."""
    process = subprocess.Popen(
        [sys.executable, "app.py", "--host", "127.0.0.1", "--port", "7869"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"Running on local URL:\s+(\S+)", line):
            # The server must not wait for a reader of its log.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process, found[1]
    raise RuntimeError("the server ended: " + "".join(lines))


def pictures(outputs: Any) -> list[str]:
    """Return the SHA-256 of the images' pixels among a view's outputs."""
    from PIL import Image  # noqa: PLC0415 (after the check for gradio)

    paths = [value["path"] if isinstance(value, dict) else value for value in outputs[:6]]
    return [
        hashlib.sha256(Image.open(path).convert("RGB").tobytes()).hexdigest()
        for path in paths
        if isinstance(path, str) and Path(path).suffix in (".png", ".webp")
    ]


def main() -> None:
    arguments(__doc__)
    if importlib.util.find_spec("gradio") is None:
        report("page", skipped="gradio is not installed")
        return
    from gradio_client import Client  # noqa: PLC0415

    began = time.perf_counter()
    process, url = start()
    try:
        report("start", seconds=round(time.perf_counter() - began, 1))
        client = Client(url, verbose=False)
        made = []
        for name in ("first", "second"):
            settings = [*SETTINGS[:1], 7 + (name == "second"), *SETTINGS[2:]]
            began = time.perf_counter()
            made.append(pictures(client.predict(*settings, api_name="/compare")))
            seconds = round(time.perf_counter() - began, 2)
            report(f"{name} comparison", seconds=seconds, images=len(set(made[-1])))

        # Stop: a long job is cancelled, the next one starts at once and gives the same pixels.
        long = [*SETTINGS[:1], 9, SETTINGS[2], MANY_STEPS, *SETTINGS[4:]]
        job = client.submit(*long, api_name="/compare")
        time.sleep(1)
        job.cancel()
        began = time.perf_counter()
        again = Client(url, verbose=False).predict(*SETTINGS, api_name="/compare")
        report(
            "after Stop",
            seconds=round(time.perf_counter() - began, 2),
            same_pixels=pictures(again) == made[0],
        )
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
