"""Seconds of the three arms with compiled blocks, as `app.py --compile` has them.

python tests/tools/cuda/compiled.py sdxl
"""

from arms import load, measure
from results import arguments, report, timed

from noiserefine.denoiser import denoiser


def main() -> None:
    args = arguments(__doc__, "architecture")
    name = args.architecture
    pipe, refiner = load(name, args.small)
    refiner.merge()
    denoiser(pipe).compile_repeated_blocks()
    took, figures = timed(lambda: measure(pipe, refiner, 1, 1 if args.small else 5))
    report(f"{name}, merged, compiled, batch 1", **figures, seconds_with_compiling=round(took, 1))


if __name__ == "__main__":
    main()
