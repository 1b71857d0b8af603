"""Measure robustness, one line a figure: `name: value (goal)`.

python -m tests.tools.stress              # all checks
python -m tests.tools.stress --quick      # a tenth of the counts, a few minutes
python -m tests.tools.stress --only training base requests uploads refiners files visitors memory

The exit status is 1 if a figure misses its goal.
"""

import argparse
import sys

from tests.tools.stress.base import base
from tests.tools.stress.files import files
from tests.tools.stress.refiners import refiners
from tests.tools.stress.requests import requests
from tests.tools.stress.training import training
from tests.tools.stress.uploads import uploads
from tests.tools.stress.visitors import memory, visitors

CHECKS = {
    check.__name__: check
    for check in (training, base, requests, uploads, refiners, files, visitors, memory)
}


def main() -> None:
    """Run the chosen checks and print their figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the counts")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    args = parser.parse_args()
    missed = False
    for name in args.only:
        for figure in CHECKS[name](lambda full: max(1, full // 10) if args.quick else full):
            verdict = "" if figure.holds else "  FALLS SHORT"
            print(f"{name}: {figure.name}: {figure.value} ({figure.goal}){verdict}", flush=True)
            missed |= not figure.holds
    sys.exit(missed)


if __name__ == "__main__":
    main()
