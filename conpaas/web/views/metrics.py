"""Values for the charts."""

from aiohttp import web

from conpaas.core.errors import BadInputError
from conpaas.web import visits

routes = web.RouteTableDef()


@routes.get("/services/{service:[A-Za-z0-9-]+}/metrics")
async def metrics(request: web.Request) -> web.Response:
    """Return the points of the last minutes, oldest first."""
    api = await visits.api(request)
    minutes = request.query.get("minutes", "60")
    if not minutes.isdecimal():
        raise BadInputError(f"'{minutes[:20]}' is not a number of minutes", value=minutes)
    points = await api.metrics(request.match_info["service"], minutes=int(minutes))
    return web.json_response([point.model_dump(mode="json") for point in points])
