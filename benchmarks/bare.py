"""The least that a program with aiohttp can be: the floor under our daemons and our API. Loads nothing of ours.

python bare.py ADDRESS PORT BODY-FILE                      answers every GET with the body, as JSON
python bare.py ADDRESS PORT BODY-FILE KEY-AND-CERT CA      the same over mutual TLS
"""

import ssl
import sys
from pathlib import Path

from aiohttp import web


def main() -> None:
    """Serve until killed."""
    address, port, body_file, *tls = sys.argv[1:]
    body = Path(body_file).read_bytes()

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    context = None
    if tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls[1])
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(tls[0])
    web.run_app(app, host=address, port=int(port), ssl_context=context, access_log=None, print=None)


if __name__ == "__main__":
    main()
