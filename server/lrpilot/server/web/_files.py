"""The files of the page, read from the package once, and how a browser keeps them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_TEXT = "text/plain; charset=utf-8"


class File(NamedTuple):
    """One file as it is served."""

    content: bytes
    media_type: str
    etag: str
    """Of the content: an upgrade shows at once, and what did not change is not sent again."""

    def answer(self, request: Request) -> Response:
        """Return the file, or that the browser has it already."""
        headers = {"ETag": self.etag, "Cache-Control": "no-cache"}
        known = request.headers.get("If-None-Match", "")
        # A proxy that compresses marks the tag as weak.
        if self.etag in {tag.strip().removeprefix("W/") for tag in known.split(",")}:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def read_files() -> Mapping[str, File]:
    """Return every file of the page by its path below `static`, such as `vendor/x/LICENSE`."""
    folder = Path(__file__).parent / "static"
    return {
        path.relative_to(folder).as_posix(): _read(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def _read(path: Path) -> File:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return File(content, _MEDIA_TYPES.get(path.suffix, _TEXT), etag)
