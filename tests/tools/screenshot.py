"""Make the README's picture of the page, or one of a tab: start the app, take a screenshot.

python -m tests.tools.screenshot --output assets/pictures/page.png
python -m tests.tools.screenshot --tab Frequencies --output frequencies.png
"""

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.chromium import launch
from tests.conftest import running_app


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt", help="generate; the comparison that opens if not given")
    parser.add_argument("--tab", help="take a picture of this tab only")
    parser.add_argument("--width", type=int, default=1120)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    with running_app() as address, sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page(
            viewport={"width": args.width, "height": 900},
            color_scheme="dark" if args.dark else "light",
        )
        page.goto(address)
        page.wait_for_selector("gradio-app.ready", timeout=120_000)
        if args.prompt:
            page.get_by_label("Prompt", exact=True).fill(args.prompt)
            page.get_by_label("Prompt", exact=True).press("Enter")
            # The page opens with a comparison, but only one that is complete joins the history.
            page.locator("#history img").wait_for(timeout=120_000)
            page.locator(".toast-body").first.wait_for(state="hidden", timeout=120_000)
        if args.tab:
            page.get_by_role("tab", name=args.tab, exact=True).click()
            panel = page.locator("[role=tabpanel]").locator("visible=true")
            panel.get_by_role("button", name="Show", exact=True).click()
            images, seen = panel.locator(".images img"), -1
            images.first.wait_for(timeout=120_000)
            while seen < (seen := images.count()):  # they come one by one
                page.wait_for_timeout(4000)
            page.mouse.move(0, 0)
            panel.screenshot(path=args.output)
        else:
            page.screenshot(path=args.output)
        browser.close()


if __name__ == "__main__":
    main()
