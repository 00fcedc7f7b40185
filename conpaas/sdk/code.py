"""Code versions: sending, fetching and activating them."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from conpaas.core import archive, files
from conpaas.core.errors import BadInputError
from conpaas.core.messages import manager, public
from conpaas.core.messages.internal import UploadQuery
from conpaas.core.messages.model import CodeVersionView, OperationView
from conpaas.core.messages.public import CheckoutCode, Keyed
from conpaas.sdk.caller import new_key
from conpaas.sdk.operations import OperationCalls

CHUNK_BYTES = 256 * 1024
DOWNLOAD_LIMIT_BYTES = 1 << 40

Source = Path | str | AsyncIterator[bytes]


class CodeCalls(OperationCalls):
    """The code versions of a service."""

    async def code(self, service: str) -> tuple[CodeVersionView, ...]:
        """Return the code versions of a service, newest first."""
        answer: manager.CodeVersions = await self._call(public.LIST_CODE, service=service)
        return answer.items

    async def upload(
        self,
        service: str,
        source: Source,
        filename: str | None = None,
        *,
        description: str = "",
        activate: bool = False,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> CodeVersionView:
        """Send an archive, or a directory (it is packed first), as a new code version, streamed.

        A stream needs a `filename`. `on_progress` is told bytes sent and, if known, their total. With
        `activate` the version is activated when it has arrived, and the call returns when it serves.
        """
        async with AsyncExitStack() as stack:
            if isinstance(source, Path | str):
                path, default = await _archive_of(Path(source), stack)
                chunks, total = _read(path), path.stat().st_size
            else:
                chunks, total, default = source, None, "code.tar.gz"
            version: CodeVersionView = await self._rpc.call(
                public.UPLOAD_CODE,
                query=UploadQuery(filename=filename or default, description=description),
                data=_counted(chunks, total, on_progress),
                service=service,
            )
        if activate:
            await self.activate(service, version.id, wait=True)
        return version

    async def checkout(self, service: str, url: str, *, branch: str = "", key: str | None = None) -> CodeVersionView:
        """Make a code version of a git repository."""
        body = CheckoutCode(url=url, branch=branch, key=new_key(key))
        answer: CodeVersionView = await self._call(public.CHECKOUT_CODE, body, service=service)
        return answer

    async def activate(
        self,
        service: str,
        version: str,
        *,
        wait: bool = False,
        generation: int | None = None,
        key: str | None = None,
    ) -> OperationView:
        """Make a code version the one that serves."""
        body = Keyed(key=new_key(key))
        answer = await self._change(public.ACTIVATE_CODE, body, generation=generation, service=service, version=version)
        return await self._done(answer, wait=wait)

    async def delete_code(self, service: str, version: str) -> None:
        """Delete a code version that is not active."""
        await self._call(public.DELETE_CODE, service=service, version=version)

    @contextlib.asynccontextmanager
    async def open_code(self, service: str, version: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open the bytes of a code version, to be read as they come."""
        async with self._rpc.stream(public.DOWNLOAD_CODE, service=service, version=version) as response:
            yield response.content.iter_chunked(CHUNK_BYTES)

    async def download(self, service: str, version: str, target: Path | str) -> Path:
        """Write a code version to the file `target`; it is whole or absent."""
        path = Path(target)
        async with self.open_code(service, version) as chunks:
            await files.receive(chunks, path, limit=DOWNLOAD_LIMIT_BYTES)
        return path


async def _archive_of(source: Path, stack: AsyncExitStack) -> tuple[Path, str]:
    """Return an archive of `source` and its name; a packed directory lives as long as `stack`."""
    if source.is_file():
        return source, source.name
    if not source.is_dir():
        raise BadInputError(
            f"there is no file or directory {source}", value=source, hint="give an archive or a source tree"
        )
    name = f"{source.resolve().name or 'code'}.tar.gz"
    packed = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="conpaas-"))) / name
    await asyncio.to_thread(archive.pack, source, packed)
    return packed, name


async def _read(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk


async def _counted(
    chunks: AsyncIterator[bytes], total: int | None, on_progress: Callable[[int, int | None], None] | None
) -> AsyncIterator[bytes]:
    sent = 0
    async for chunk in chunks:
        yield chunk
        sent += len(chunk)
        if on_progress is not None:
            on_progress(sent, total)
