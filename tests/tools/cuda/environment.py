"""The card, its driver, the packages, and the speed of a matrix product and a copy."""

import importlib.metadata
import platform
import subprocess

import torch
from results import arguments, device, report, timed

PACKAGES = (
    *("torch", "diffusers", "transformers", "peft", "accelerate", "gradio", "spaces"),
    *("huggingface_hub", "safetensors", "triton", "bitsandbytes"),
)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def matrix_product(side: int, times: int = 10) -> float:
    """Return 10^12 operations a second of bfloat16 products of square matrices."""
    a, b = (torch.randn(side, side, device=device(), dtype=torch.bfloat16) for _ in range(2))
    a @ b
    seconds, _ = timed(lambda: [a @ b for _ in range(times)])
    return times * 2 * side**3 / seconds / 1e12


def copy_speed(gib: float, times: int = 10) -> float:
    """Return GiB a second read and written by copies on the device."""
    source = torch.zeros(int(gib * 2**30), device=device(), dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds, _ = timed(lambda: [target.copy_(source) for _ in range(times)])
    return 2 * times * gib / seconds


def main() -> None:
    small = arguments(__doc__).small
    report(
        "versions", python=platform.python_version(), **{name: version(name) for name in PACKAGES}
    )
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        report(
            "card",
            name=card.name,
            gib=round(card.total_memory / 2**30, 1),
            capability=f"{card.major}.{card.minor}",
            driver=driver,
            cuda=torch.version.cuda,
        )
    report(
        "speed",
        tflops_bf16=round(matrix_product(256 if small else 8192), 3),
        gib_per_second=round(copy_speed(0.01 if small else 4), 1),
    )


if __name__ == "__main__":
    main()
