"""The tests of tests/test_cuda.py, each outcome as it comes."""

import os
import sys

import pytest
from results import arguments, report


class Outcomes:
    """A plugin of pytest that reports every test's outcome, and why it failed."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            _report(report)


def _report(test: pytest.TestReport) -> None:
    figures = {"outcome": test.outcome, "seconds": round(test.duration, 1)}
    if test.outcome == "failed":
        figures["why"] = test.longreprtext[-600:]
    report(test.nodeid.split("::")[-1], **figures)


if __name__ == "__main__":
    if arguments(__doc__).small:
        os.environ["NOISEREFINE_TEST_DEVICE"] = "cpu"
    options = ["tests/test_cuda.py", "-p", "no:cacheprovider", "--tb=short", "--capture=no"]
    sys.exit(pytest.main(options, plugins=[Outcomes()]))
