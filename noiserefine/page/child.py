"""Run a script until it ends or the page asks it to: `python -m noiserefine.page.child SCRIPT ...`.

The page holds the other end of standard input. It ends when the page closes it or when the page
itself ends, however that happens; the script is then interrupted as by Ctrl-C.
"""

import _thread
import os
import runpy
import signal
import sys
import threading


def main() -> None:
    """Run the script that the command line names, with the arguments after it."""
    # A shell that starts the page in the background has the interrupt ignored, also in children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_interrupt_at_the_end_of_input, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _interrupt_at_the_end_of_input() -> None:
    # os.read, since a thread that waits in sys.stdin would keep its lock when Python ends.
    while os.read(0, 1):
        pass
    _thread.interrupt_main()


if __name__ == "__main__":
    main()
