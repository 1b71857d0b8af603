"""The project as a whole: installation and requirements."""

import subprocess
import sys

from tests.conftest import ROOT
from tests.tools.requirements import requirements


def test_requirements_are_those_of_the_project():
    assert (ROOT / "requirements.txt").read_text() == requirements(), (
        "run `python tests/tools/requirements.py`"
    )


def test_the_library_is_imported_from_anywhere(tmp_path):
    code = "import noiserefine; print(noiserefine.Refiner, noiserefine.draw_noise)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
