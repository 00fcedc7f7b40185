"""Calls of Amazon's services: each has a deadline, is made once, and fails with an error of the contract."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import cache
from typing import Any, TypeVar

from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
from aiobotocore.session import AioSession  # type: ignore[import-untyped]
from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from conpaas.cloud.ec2 import Ec2Settings
from conpaas.core.cloud import CloudContext
from conpaas.core.errors import (
    BadInputError,
    CloudBusyError,
    CloudCredentialsError,
    CloudRefusedError,
    ConpaasError,
    DeadlineError,
    NoCapacityError,
    PeerError,
    QuotaExceededError,
    ThrottledError,
    UnknownImageError,
)

# At level DEBUG they write down what instances are given, a one-use token included.
for _name in ("aiobotocore", "botocore"):
    logging.getLogger(_name).setLevel(logging.INFO)

T = TypeVar("T")
Answer = dict[str, Any]

CONNECTIONS = 64
WORDS_CHARACTERS = 800
OPENING_S = 20.0  # no call: descriptions are read, and the computer is asked for its own credentials

_BY_CODE: dict[str, type[ConpaasError]] = {
    **dict.fromkeys(
        (
            "BandwidthLimitExceeded",
            "EC2ThrottledException",
            "RequestLimitExceeded",
            "RequestThrottled",
            "RequestThrottledException",
            "SlowDown",
            "ThrottledException",
            "Throttling",
            "ThrottlingException",
            "TooManyRequestsException",
        ),
        ThrottledError,
    ),
    **dict.fromkeys(
        (
            "InsufficientAddressCapacity",
            "InsufficientCapacity",
            "InsufficientFreeAddressesInSubnet",
            "InsufficientHostCapacity",
            "InsufficientInstanceCapacity",
            "InsufficientReservedInstanceCapacity",
            "InsufficientVolumeCapacity",
            "SpotMaxPriceTooLow",
        ),
        NoCapacityError,
    ),
    **dict.fromkeys(
        ("MaxSpotInstanceCountExceeded", "MaxIOPSLimitExceeded", "AttachmentLimitExceeded"), QuotaExceededError
    ),
    **dict.fromkeys(
        (
            "AccessDenied",
            "AccessDeniedException",
            "AuthFailure",
            "Blocked",
            "ExpiredToken",
            "ExpiredTokenException",
            "InvalidClientTokenId",
            "InvalidSecurityToken",
            "InvalidSignatureException",
            "MissingAuthenticationToken",
            "NotAuthorized",
            "OptInRequired",
            "RequestExpired",
            "SignatureDoesNotMatch",
            "UnauthorizedOperation",
            "UnrecognizedClientException",
        ),
        CloudCredentialsError,
    ),
    **dict.fromkeys(
        (
            "ConcurrentTagAccess",
            "DependencyViolation",  # what is in the way is going away
            "IncorrectInstanceState",
            "IncorrectState",
            "InvalidAttachment.NotFound",  # of one that we have seen
            "InvalidGroup.NotFound",  # it was deleted meanwhile, or is not known everywhere yet
            "InvalidInstanceID.NotFound",  # of an instance that we have seen
            "InvalidVolume.NotFound",
            "PendingVerification",
            "ServiceUnavailable",
            "Unavailable",
        ),
        CloudBusyError,
    ),
    # A request with this token was taken before: its instance is there, or will be.
    "IdempotentParameterMismatch": PeerError,
}


def error_for(cloud: str, operation: str, answer: Answer) -> ConpaasError:
    """Return the error that an error answer stands for. Its `value` is Amazon's code, its message Amazon's words."""
    problem, metadata = answer.get("Error", {}), answer.get("ResponseMetadata", {})
    code, text = str(problem.get("Code", "")), str(problem.get("Message", ""))
    said = _cut(text.partition(" Encoded authorization failure message:")[0])
    message = f"cloud {cloud}: {operation}: {said} ({code})"
    kind = _kind(code, text, int(metadata.get("HTTPStatusCode") or 0))
    if kind is ThrottledError:
        return ThrottledError(message, value=code, retry_after_s=_seconds(metadata.get("HTTPHeaders", {})))
    return kind(message, value=code)


def _kind(code: str, text: str, status: int) -> type[ConpaasError]:
    if code.startswith("InvalidAMIID.") or (code == "AuthFailure" and "images" in text):
        return UnknownImageError  # "Not authorized for images: [ami-…]": another account's, or deregistered
    if code == "InvalidParameterValue" and "already in use" in text:
        return CloudBusyError  # the name of a device: the list of those in use lags behind
    if code in _BY_CODE:
        return _BY_CODE[code]
    if code.endswith("LimitExceeded"):
        return QuotaExceededError
    return PeerError if status >= 500 else CloudRefusedError


def _seconds(headers: dict[str, str]) -> float | None:
    """Return the pause that a `Retry-After` in seconds asks for."""
    text = headers.get("retry-after", "")
    return float(text) if text.isdigit() else None


_BY_EXCEPTION: tuple[tuple[tuple[type[Exception], ...], type[ConpaasError]], ...] = (
    ((boto.ConnectTimeoutError, boto.ReadTimeoutError, TimeoutError), DeadlineError),
    (
        (
            boto.NoCredentialsError,
            boto.PartialCredentialsError,
            boto.CredentialRetrievalError,
            boto.TokenRetrievalError,
        ),
        CloudCredentialsError,
    ),
    ((boto.ParamValidationError,), BadInputError),
    ((boto.InvalidRegionError, boto.EndpointProviderError), CloudRefusedError),
)


def _error_of(cloud: str, operation: str, exc: Exception) -> ConpaasError:
    """Return the error that a failure to get an answer stands for."""
    for kinds, kind in _BY_EXCEPTION:
        if isinstance(exc, kinds):
            return kind(f"cloud {cloud}: {operation}: {_cut(str(exc)) or 'no answer in time'}")
    return PeerError(f"cloud {cloud}: {operation}: {exc.__class__.__name__}: {_cut(str(exc))}")


def _cut(words: str) -> str:
    """Return the beginning of an error's words: botocore quotes the whole of an answer that it cannot read."""
    return " ".join(words.split())[:WORDS_CHARACTERS]


def _read(answer: Answer, read: Callable[[Answer], T]) -> T:
    if not answer["ResponseMetadata"]["RequestId"]:
        raise ValueError("it has no request id")  # well-formed, but of somebody between us and Amazon
    return read(answer)


@cache
def session() -> AioSession:
    """Return what holds the descriptions of Amazon's services: reading them takes longer than any call."""
    return AioSession()


class Client:
    """One of Amazon's services, as one account sees it. Connects when it is first used."""

    def __init__(
        self, service: str, settings: Ec2Settings, context: CloudContext, *, endpoint: str, region: str = ""
    ) -> None:
        self._service, self._context, self._cloud = service, context, context.name
        self._keys = {
            "aws_access_key_id": settings.access_key or None,
            "aws_secret_access_key": settings.secret_key.get_secret_value() or None,
            "aws_session_token": settings.session_token.get_secret_value() or None,
        }
        self._region, self._endpoint, self._page = region or settings.region, endpoint or None, settings.page
        self._opening = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._client: Any = None

    async def call(self, operation: str, read: Callable[[Answer], T], **parameters: Any) -> T:
        """Make one call, and return what `read` finds in its answer; PeerError if it is not there.

        `operation` is named as by botocore: `run_instances`.
        """
        try:
            async with asyncio.timeout(OPENING_S):
                client = await self._opened()
            async with asyncio.timeout(self._context.deadline_s):
                answer = await getattr(client, operation)(**parameters)
            return _read(answer, read)
        except boto.ClientError as exc:
            raise error_for(self._cloud, operation, dict(exc.response)) from exc
        except (boto.BotoCoreError, ResponseParserError, TimeoutError) as exc:
            raise _error_of(self._cloud, operation, exc) from exc
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as exc:
            # What botocore's parsers, and `read`, make of an answer that is not of the protocol.
            raise PeerError(f"cloud {self._cloud}: {operation}: the answer makes no sense: {_cut(repr(exc))}") from exc

    async def pages(self, operation: str, read: Callable[[Answer], Sequence[T]], **parameters: Any) -> list[T]:
        """Make as many calls as it takes to get the whole of a list; each may bring less than a page, or nothing."""
        found: list[T] = []
        parameters["MaxResults"] = self._page
        while True:
            some, following = await self.call(
                operation, lambda answer: (read(answer), answer.get("NextToken")), **parameters
            )
            found.extend(some)
            if not following:
                return found
            parameters["NextToken"] = following

    async def close(self) -> None:
        """Close the connections."""
        await self._stack.aclose()

    async def _opened(self) -> Any:
        async with self._opening:
            if self._client is None:
                config = AioConfig(
                    connect_timeout=None,  # the deadline is around the whole call
                    read_timeout=None,
                    max_pool_connections=CONNECTIONS,
                    retries={"total_max_attempts": 1},  # the director repeats
                    ignore_configured_endpoint_urls=True,
                    user_agent_extra="conpaas",
                    warm_up_loader_caches=True,
                )
                opening = session().create_client(
                    self._service,
                    region_name=self._region,
                    endpoint_url=self._endpoint,
                    verify=False if (self._endpoint or "").startswith("http:") else None,  # reads no certificates
                    config=config,
                    **self._keys,
                )
                self._client = await self._stack.enter_async_context(opening)
            return self._client
