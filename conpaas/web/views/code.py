"""Code versions: what is uploaded, checked out, activated, downloaded, deleted. Bytes pass through, never pile up."""

import re

from aiohttp import web

from conpaas.core.errors import BadInputError
from conpaas.web import pages, visits

routes = web.RouteTableDef()
SERVICE = "/services/{service:[A-Za-z0-9-]+}"
VERSION = SERVICE + "/code/{version:[A-Za-z0-9-]+}"
_CHUNK_BYTES = 1 << 18


@routes.post(f"{SERVICE}/code")
async def upload(request: web.Request) -> web.Response:
    """Pass an archive, sent by `upload.js` as the whole body, on to the director."""
    api = await visits.api(request)
    filename = request.query.get("filename", "")
    if not filename:
        raise BadInputError("choose an archive first", hint="a .zip or .tar of your source tree")
    service = request.match_info["service"]
    version = await api.upload(
        service,
        request.content.iter_chunked(_CHUNK_BYTES),
        filename,
        description=request.query.get("description", ""),
    )
    return pages.done(request, f"/services/{service}#code", f"{version.id} is uploaded: activate it to use it")


@routes.post(f"{SERVICE}/checkout")
async def checkout(request: web.Request) -> web.Response:
    """Make a code version of a git repository."""
    api = await visits.api(request)
    service, form = request.match_info["service"], await request.post()
    version = await api.checkout(service, str(form.get("url", "")).strip(), branch=str(form.get("branch", "")).strip())
    return pages.done(request, f"/services/{service}#code", f"{version.id} is checked out: activate it to use it")


@routes.get(f"{VERSION}/download")
async def download(request: web.Request) -> web.StreamResponse:
    """Pass the archive of a code version on to the browser."""
    api = await visits.api(request)
    service, version = request.match_info["service"], request.match_info["version"]
    known = {item.id: item.filename for item in await api.code(service)}
    filename = re.sub(r"[^A-Za-z0-9._-]", "_", known.get(version, version))
    async with api.open_code(service, version) as chunks:
        response = web.StreamResponse(
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Disposition": f'attachment; filename="{filename}"',
            }
        )
        await response.prepare(request)
        async for chunk in chunks:
            await response.write(chunk)
    return response


@routes.post(f"{VERSION}/activate")
async def activate(request: web.Request) -> web.Response:
    """Make a code version the one that serves."""
    api = await visits.api(request)
    service, version = request.match_info["service"], request.match_info["version"]
    await api.activate(service, version)
    return pages.done(request, f"/services/{service}#code", f"{version} is being activated")


@routes.post(f"{VERSION}/delete")
async def delete(request: web.Request) -> web.Response:
    """Delete a code version that is not active."""
    api = await visits.api(request)
    service, version = request.match_info["service"], request.match_info["version"]
    await api.delete_code(service, version)
    return pages.done(request, f"/services/{service}#code", f"{version} is deleted")
