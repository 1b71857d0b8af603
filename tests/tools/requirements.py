"""Write requirements.txt, which a Hugging Face Space installs, from pyproject.toml.

python tests/tools/requirements.py
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def requirements() -> str:
    """Return the text of requirements.txt: the project's own dependencies, one a line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    header = "# Written by tests/tools/requirements.py from pyproject.toml.\n"
    return header + "".join(f"{dependency}\n" for dependency in project["dependencies"])


if __name__ == "__main__":
    (ROOT / "requirements.txt").write_text(requirements())
