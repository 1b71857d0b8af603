"""The project as a whole: installation and requirements."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.tools.requirements import requirements
from train.tools.readme_table import PAGES, filled

MOST_WORDS = 900


def test_requirements_are_those_of_the_project():
    assert (ROOT / "requirements.txt").read_text() == requirements(), (
        "run `python tests/tools/requirements.py`"
    )


def test_the_library_is_imported_from_anywhere(tmp_path):
    code = "import noiserefine; print(noiserefine.Refiner, noiserefine.draw_noise)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_tables_are_those_of_the_figures():
    for page in PAGES:
        assert page.read_text() == filled(page.read_text()), (
            f"{page.name} is out of date: run `python train/tools/readme_table.py`"
        )


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "assets/results/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert all((ROOT / page).parent.joinpath(link).exists() for link in links if "://" not in link)
