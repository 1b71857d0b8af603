"""The versions of the packages that pixels depend on, for records of what was made."""

import importlib.metadata

PACKAGES = ("torch", "diffusers", "transformers", "peft")


def package_versions() -> dict[str, str]:
    """Return each package's version by its name."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
