"""The role `web`: an nginx that serves the files of the code."""

import asyncio
import time

from conpaas.core.service import Health, RoleAgent
from conpaas.services.php import nginx, node, site
from conpaas.services.php.messages import WEB_PORT, WebConfig


class WebAgent(RoleAgent[WebConfig]):
    """Serves what `current/root` leads to: the unpacked code itself, which nobody writes to."""

    config = WebConfig
    _counted: tuple[float, float] | None = None

    async def apply(self, config: WebConfig) -> None:
        """Unpack the code, switch to it, make sure that nginx serves."""
        if config.prepare:
            last = node.recall(self.host, WebConfig)
            await node.prepare(self.host, config, None if last is None else last.code)
            if last is None:
                return
            config = last
        empty = self.host.directory / "empty"
        empty.mkdir(exist_ok=True)
        code = empty if config.code is None else await self.host.unpacked(config.code)
        root = site.visible(code, config.document_root)
        closed = await asyncio.to_thread(site.closed_folders, root)
        site.publish(self.host.directory, root, front=False, closed=closed)
        await nginx.ensure(self.host, "nginx-web.conf", port=WEB_PORT)
        node.remember(self.host, config)

    async def health(self) -> Health:
        """Ask nginx."""
        return await nginx.health(self.host, port=WEB_PORT)

    async def metrics(self) -> dict[str, float]:
        """Return the requests per second, pings left out as far as they are known."""
        answer = (await node.get(self.host.address, WEB_PORT, "/__conpaas/nginx")).split()
        requests, now = float(answer[9]), time.monotonic()
        before, self._counted = self._counted, (requests, now)
        if before is None or requests < before[0]:
            return {}
        return {"web_request_rate": (requests - before[0]) / max(now - before[1], 0.001)}

    async def stop(self, drain_s: float) -> None:
        """End nginx when its requests are done."""
        node.forget(self.host)
        await nginx.stop(self.host, drain_s)
