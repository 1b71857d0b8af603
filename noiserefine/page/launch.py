"""The start of the page: flags, build, launch."""

import argparse
import importlib
import sys

from starlette.middleware import Middleware

from noiserefine.models.catalogue import OFFLOADS, Model
from noiserefine.page.handlers import jobs
from noiserefine.page.layout import COLUMNS_CSS, CSS, FAVICON, HEAD, JAVASCRIPT, THEME
from noiserefine.page.settings import REFINERS, SERVED, ZERO_GPU
from noiserefine.page.share_card import ShareCard
from noiserefine.page.wiring import build_page

ABOUT = """One prompt and seed, three images, and views that show why refining works.

python app.py --host 127.0.0.1 --port 7860
"""


def _place_models() -> None:
    """Load every served model before ZeroGPU forks a worker, which loses what it loads itself."""
    for name in list(SERVED):
        try:
            jobs.MODELS.get(Model(name))
        except (ValueError, OSError) as error:
            print(f"{name} is not served: {error}")
            SERVED.remove(name)
    for extra in REFINERS.values():
        jobs.MODELS.get(Model(extra.backbone, extra.folder))


def _parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--host", help="address to listen on; GRADIO_SERVER_NAME or 127.0.0.1 if not given"
    )
    parser.add_argument(
        "--port", type=int, help="GRADIO_SERVER_PORT or the first free one from 7860 if not given"
    )
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="none",
        help="for small cards: " + "; ".join(f"{k}: {v}" for k, v in OFFLOADS.items()),
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer blocks: a slow first image, quicker ones after it",
    )
    args = parser.parse_args()
    if args.offload != "none" and args.compile:
        parser.error(
            "--compile and --offload exclude each other: compiled blocks stay where they are."
        )
    if args.offload != "none":
        from noiserefine.models.devices import default_device  # noqa: PLC0415 (takes seconds)

        if default_device().type == "cpu":
            parser.error(
                "--offload saves the memory of a graphics card, and this machine has none."
            )
    return args


def main() -> None:
    """Launch the page and import what images are made with while the first visitor reads."""
    args = _parse()
    if args.offload != "none" or args.compile:
        jobs.MODELS.offload, jobs.MODELS.compiled = args.offload, args.compile
    try:
        demo.launch(
            server_name=args.host,
            server_port=args.port,
            theme=THEME,
            css=COLUMNS_CSS,
            css_paths=[CSS],
            js=JAVASCRIPT,
            head_paths=HEAD,
            favicon_path=FAVICON,
            show_error=True,
            state_session_capacity=100,
            mcp_server=True,
            app_kwargs={"middleware": [Middleware(ShareCard)]},
            prevent_thread_lock=True,
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        port = args.port or "from 7860 on"
        sys.exit(f"Port {port} is taken by another program: choose another one with --port.")
    importlib.import_module("noiserefine.page.jobs")
    demo.block_thread()


if ZERO_GPU:
    _place_models()
demo = build_page().queue(max_size=64)
