"""The project as a whole: installation, pages, the direction of imports."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

from tests.conftest import ROOT
from tests.tools.requirements import requirements
from train.tools.readme_table import PAGES, filled

MOST_WORDS = 900
FLOORS = {  # a package may import those at its own floor and below
    "noiserefine": 0,
    "noiserefine.models": 1,
    "noiserefine.analysis": 2,
    "noiserefine.page": 3,
}


def test_requirements_are_those_of_the_project():
    assert (ROOT / "requirements.txt").read_text() == requirements(), (
        "run `python tests/tools/requirements.py`"
    )


def test_what_is_imported_is_required():
    """A package that comes with another today may not tomorrow."""
    listed = set(re.findall(r"^[\w-]+", requirements().lower(), re.MULTILINE))
    packages = packages_distributions()
    for path in (ROOT / "noiserefine").rglob("*.py"):
        for package in {name.partition(".")[0] for name in _imports(path)}:
            if package not in sys.stdlib_module_names | {"noiserefine"}:
                owners = {owner.lower() for owner in packages[package]}
                assert owners & listed, f"{path.name} imports {package}"


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


def _floor(module: str) -> int:
    package = ".".join(module.split(".")[:2])
    return FLOORS.get(package, 0)


def _imports(path) -> list[str]:
    tree = ast.parse(path.read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = [f"{node.module}.{alias.name}" for node in froms for alias in node.names]
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    return modules + [alias.name for node in imports for alias in node.names]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "noiserefine").rglob("*.py")), ids=lambda path: path.stem
)
def test_imports_point_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for imported in _imports(path):
        assert not imported.startswith(("train", "app", "tests")), imported
        if imported.startswith("noiserefine"):
            assert _floor(imported) <= _floor(module), f"{module} imports {imported}"
