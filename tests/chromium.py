"""A headless Chromium for the tests of the page and for its screenshots."""

import functools
import shutil
import subprocess
import sys

from playwright.sync_api import Browser, Error, Playwright

SYSTEM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


class NoBrowserError(RuntimeError):
    """No Chromium is installed, and none could be installed."""


def launch(playwright: Playwright) -> Browser:
    """Launch the system's Chromium, else Playwright's own, which is installed if it is missing.

    Raises NoBrowserError if there is none and it cannot be installed.
    """
    if path := next(filter(None, map(shutil.which, SYSTEM_NAMES)), None):
        return playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
    try:
        return playwright.chromium.launch(args=ARGUMENTS)
    except Error:
        _install()
    try:
        return playwright.chromium.launch(args=ARGUMENTS)
    except Error as error:
        raise NoBrowserError(
            f"Playwright's Chromium does not start ({str(error).strip().splitlines()[0]}). "
            "Install its libraries with `playwright install-deps chromium`."
        ) from error


@functools.cache
def _install() -> None:
    command = [sys.executable, "-m", "playwright", "install", "chromium"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        lines = (error.stderr or str(error)).strip().splitlines()
        reason = next((line for line in lines if "rror" in line), lines[0])
        raise NoBrowserError(
            f"No Chromium was found, and `playwright install chromium` failed ({reason.strip()}). "
            "Install a browser with `apt-get install chromium`."
        ) from error
