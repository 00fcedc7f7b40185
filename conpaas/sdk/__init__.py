"""The typed async client of ConPaaS.

    from conpaas.sdk import connect

    async with connect("http://127.0.0.1:9999", token) as conpaas:
        blog = await conpaas.create(type="php", name="blog")
        await conpaas.upload(blog.id, "site.tar.gz", activate=True)
        await conpaas.start(blog.id, wait=True)
        await conpaas.scale(blog.id, {"web": +2, "php": +1}, wait=True)

Every method answers a message of `conpaas.core.messages` and raises a class of `conpaas.core.errors`.
"""

from conpaas.sdk.captcha import solve
from conpaas.sdk.client import Conpaas, connect, login
from conpaas.sdk.operations import OperationFailedError

__all__ = ["Conpaas", "OperationFailedError", "connect", "login", "solve"]
