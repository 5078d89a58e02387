"""The page at `/`, which asks this server and no other: the files of `runtime/view`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Response

from fusionroute.runtime.view.page import answer_page, asset

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
FILES = {  # by path; answer.html is what the page puts an answer into, to share it
    "/": "playground.html",
    **{f"/playground/{name}": name for name in ("answer.css", "answer.js", "playground.css", "playground.js", "answer.html")},
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def add_playground(app: FastAPI) -> None:
    """The routes of the page and its files."""
    for path, name in FILES.items():
        app.add_api_route(path, file(name), methods=["GET"], include_in_schema=False)


def file(name: str) -> Callable[[], Awaitable[Response]]:
    """A route that answers with a file."""
    content = answer_page(None) if name == "answer.html" else asset(name)

    async def route() -> Response:
        return Response(content, media_type=TYPES[name.rsplit(".", 1)[1]], headers=HEADERS)

    return route
