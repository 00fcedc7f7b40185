"""What the browser loads besides pages: found once, named by content, cached for good.

All files share one digest in their URL, so that our modules import each other by relative paths and still change
their names with any change.
"""

import hashlib
import mimetypes
from pathlib import Path
from xml.etree import ElementTree as ET

from aiohttp import web

ROOT = Path(__file__).parent / "static"
_SPRITE = ROOT / "vendor" / "icons.svg"
_FOREVER = "public, max-age=31536000, immutable"
_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml", ".css": "text/css"}


class StaticFiles:
    """The files below `static/`, read from the disk when asked for."""

    def __init__(self, root: Path = ROOT) -> None:
        self._files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
        digest = hashlib.sha256()
        for name, path in self._files.items():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        self.digest = digest.hexdigest()[:16]
        self.icons = _icon_names(_SPRITE)

    def url(self, name: str) -> str:
        """Return the address of a file; a name that does not exist is a bug of ours."""
        if name not in self._files:
            raise LookupError(f"no static file {name}: build the browser libraries ('pip install .')")
        return f"/static/{self.digest}/{name}"

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer `/static/DIGEST/NAME`, kept for good; an old digest, or `/static/vendor/NAME`, is asked for anew."""
        digest, name = request.match_info["digest"], request.match_info["name"]
        path = self._files.get(f"vendor/{name}" if digest == "vendor" else name)
        if path is None:
            raise web.HTTPNotFound
        kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        headers = {"Content-Type": kind, "Cache-Control": _FOREVER if digest == self.digest else "no-cache"}
        return web.FileResponse(path, headers=headers)


def _icon_names(sprite: Path) -> frozenset[str]:
    if not sprite.is_file():
        return frozenset()
    root = ET.parse(sprite).getroot()  # noqa: S314  (a file of the package)
    return frozenset(symbol.get("id", "") for symbol in root)
