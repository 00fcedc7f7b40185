"""Error answers of Amazon EC2, in its own words."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple
from xml.sax.saxutils import escape

from aiohttp import web

from tests.fakes.clouds import Fault

REQUEST_ID = "0f6a0b1c-5e0d-4f3a-9c55-3f1f8d7c2a10"

NOT_ALLOWED = (
    "You are not authorized to perform this operation. User: arn:aws:iam::123456789012:user/conpaas is not authorized "
    "to perform: ec2:RunInstances on resource: arn:aws:ec2:us-east-1:123456789012:instance/* because no identity-based "
    "policy allows the ec2:RunInstances action. Encoded authorization failure message: "
    + "4GIOHlTkIaWHQD0Q0m6XSnuUMCm-"
    * 30
)


class AmazonError(NamedTuple):
    """One error answer."""

    status: int
    code: str
    message: str

    def xml(self) -> web.Response:
        """Return it as EC2 sends it."""
        text = (
            '<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error>'
            f"<Code>{self.code}</Code><Message>{escape(self.message)}</Message>"
            f"</Error></Errors><RequestID>{REQUEST_ID}</RequestID></Response>"
        )
        return web.Response(text=text, status=self.status, content_type="text/xml")

    def json(self) -> web.Response:
        """Return it as Amazon's younger services send it."""
        text = json.dumps({"__type": self.code, "message": self.message})
        return web.Response(
            text=text,
            status=400,
            content_type="application/x-amz-json-1.1",
            headers={"x-amzn-RequestId": REQUEST_ID},
        )


BY_FAULT: Mapping[Fault, AmazonError] = MappingProxyType(
    {
        Fault.THROTTLED: AmazonError(503, "RequestLimitExceeded", "Request limit exceeded."),
        Fault.NO_CAPACITY: AmazonError(
            500,
            "InsufficientInstanceCapacity",
            "We currently do not have sufficient t2.small capacity in the Availability Zone you requested "
            "(us-east-1a). Our system will be working on provisioning additional capacity. You can currently get "
            "t2.small capacity by not specifying an Availability Zone in your request or choosing us-east-1b.",
        ),
        Fault.CREDENTIALS: AmazonError(400, "RequestExpired", "Request has expired."),
        Fault.UNKNOWN_IMAGE: AmazonError(
            400, "InvalidAMIID.NotFound", "The image id '[ami-0123456789abcdef0]' does not exist"
        ),
        Fault.NO_DISK: AmazonError(
            400,
            "VolumeLimitExceeded",
            "You have exceeded your maximum gp3 storage limit of 50 TiB in this region. Please contact AWS Support to "
            "request an Elastic Block Store service limit increase.",
        ),
    }
)
MISMATCH = AmazonError(
    400,
    "IdempotentParameterMismatch",
    "Arguments on this idempotent request are inconsistent with arguments used in previous request(s).",
)
TERMINATED = AmazonError(
    400,
    "IdempotentInstanceTerminated",
    "The instance of an earlier request with this client token has been terminated.",
)

ENDED = (
    '<TerminateInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">'
    f"<requestId>{REQUEST_ID}</requestId><instancesSet><item><instanceId>{{}}</instanceId>"
    "<currentState><code>48</code><name>terminated</name></currentState>"
    "<previousState><code>48</code><name>terminated</name></previousState>"
    "</item></instancesSet></TerminateInstancesResponse>"
)
"""The answer to the end of an instance that has ended before."""


def too_many_cores(limit: int) -> AmazonError:
    """Return what a launch beyond the quota gets."""
    return AmazonError(
        400,
        "VcpuLimitExceeded",
        f"You have requested more vCPU capacity than your current vCPU limit of {limit} allows for the instance bucket "
        "that the specified instance type belongs to. Please visit http://aws.amazon.com/contact-us/ec2-request to "
        "request an adjustment to this limit.",
    )
