"""The card that messengers and social networks show beside a link to the page.

Their programs take the first card in the HTML, which is Gradio's own, and run no JavaScript, which
Gradio needs to add the head of a page.
"""

import html
import re

from gradio.route_utils import get_root_url
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from noiserefine.models.catalogue import ASSETS

PAGE, PICTURE = "/", "/card.png"
FILE = ASSETS / "pictures" / "arms.png"
DESCRIPTION = (
    "One extra forward pass corrects the noise of an image model. Sampling without guidance then "
    "follows the prompt like sampling with guidance, at about half the cost."
)
THEIRS = re.compile(r'<meta\s+(?:name|property)="(?:og|twitter):[^>]*>')


class ShareCard(BaseHTTPMiddleware):
    """Replace the card in the page's HTML, and serve its picture."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leave every other request alone."""
        ours = scope["type"] == "http" and scope["path"] in (PAGE, PICTURE)
        await (super().__call__ if ours else self.app)(scope, receive, send)

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Return the picture, or the page with our card."""
        if request.url.path == PICTURE:
            return FileResponse(FILE)
        response = await call_next(request)
        body = b"".join([part async for part in response.body_iterator])  # type: ignore[attr-defined]
        address = get_root_url(request, PAGE, request.scope.get("root_path"))
        return HTMLResponse(with_card(body.decode(), address), response.status_code)


def with_card(page: str, address: str) -> str:
    """Return the HTML of the page at this address with our card in place of every other."""
    values = {
        "description": DESCRIPTION,
        "og:type": "website",
        "og:title": "NoiseRefine",
        "og:description": DESCRIPTION,
        "og:url": f"{address}/",
        "og:image": f"{address}{PICTURE}",
        "twitter:card": "summary_large_image",
    }
    card = "".join(
        f'<meta {"property" if ":" in name else "name"}="{name}" content="{html.escape(value)}">'
        for name, value in values.items()
    )
    return THEIRS.sub("", page).replace("<head>", f"<head>{card}", 1)
