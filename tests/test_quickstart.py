"""The notebook and the header of the trainer: training without a set-up."""

import json
import re
import tomllib

import torch
from accelerate.state import AcceleratorState

from tests.conftest import ROOT

NOTEBOOK = json.loads((ROOT / "train" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_trains_a_refiner(tmp_path, tiny_folder, monkeypatch):
    """Every code cell runs, on a tiny model in the cell of what may be changed."""
    monkeypatch.chdir(ROOT)
    AcceleratorState._reset_state(reset_partial_state=True)
    names = {}
    for code in CODE:
        exec(re.sub(r"(?m)^[%!].*$", "", code), names)
        if "backbone =" in code:
            names |= {"backbone": str(tiny_folder), "targets": 4, "output_dir": str(tmp_path)}
    assert names["log"]["validation_percent"].notna().all() and len(names["log"]) == 1
    assert len(names["plain"]) == len(names["guided"]) == len(names["refined"]) == 2
    assert names["plain"][0].tobytes() != names["guided"][0].tobytes()
    x_T = names["x_T"]
    assert not torch.equal(names["refiner"](x_T, names["prompts"][0]), x_T), "it has learnt"


def test_the_notebook_holds_no_outputs():
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"])


def test_the_trainer_s_header_names_the_project_and_nothing_else():
    """PEP 723: the versions are pyproject.toml's."""
    text = (ROOT / "train" / "train_refiner.py").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", text)
    header = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert header["dependencies"] == [f"{project['name']}[train]"]
    assert header["requires-python"] == project["requires-python"]
    source = header["tool"]["uv"]["sources"][project["name"]]
    assert (ROOT / "train" / source["path"]).resolve() == ROOT
