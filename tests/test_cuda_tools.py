"""The runner of the measurements on graphics cards, without one."""

import json
import os
import subprocess
import sys

from tests.conftest import ROOT
from train.tools import cuda_table


def run(folder, *arguments, **environment):
    command = ["bash", "tests/tools/cuda.sh", folder, "--small", *arguments]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    return json.loads((folder / "cuda.json").read_text())["parts"]


def test_results_are_written_and_tabulated(tmp_path):
    environment = run(tmp_path, "--only", "environment")["environment"]
    assert environment["status"] == "done" and environment["results"]["speed"]["tflops_bf16"] > 0
    command = [sys.executable, "train/tools/cuda_table.py", tmp_path / "cuda.json"]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert environment["results"]["versions"]["torch"] in table


def test_a_processor_has_no_peaks():
    found = {"sd21, 8 GB": dict.fromkeys(cuda_table.PHASES)}
    assert not list(cuda_table.tiers_rows(found))
    assert list(cuda_table.tiers_rows({"sd21, 8 GB": dict.fromkeys(cuda_table.PHASES, 1.0)}))


def test_a_part_that_takes_too_long_is_ended_and_recorded(tmp_path):
    parts = run(tmp_path, "--only", "sdxl", "page", TOTAL_SECONDS="1", LEAST_SECONDS="0.5")
    assert parts["sdxl"]["status"] == "timed out"
    assert parts["page"]["status"] == "not started: no time left"
