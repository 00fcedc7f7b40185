"""The driver of the clouds that apache-libcloud speaks to: which of its classes is whose."""

from libcloud.compute.providers import DRIVERS

from conpaas.cloud._libcloud_cloud import LibcloudCloud
from conpaas.cloud._libcloud_ec2 import Ec2
from conpaas.cloud._libcloud_named import DIALECTS, Named
from conpaas.cloud._libcloud_openstack import OpenStack
from conpaas.cloud._libcloud_volumes import LibcloudDisks, OpenStackCloud
from conpaas.cloud.libcloud import LibcloudSettings
from conpaas.core.cloud import Cloud, CloudContext
from conpaas.core.errors import CloudRefusedError

USABLE = ("openstack", "ec2", *DIALECTS)


def driver(settings: LibcloudSettings, context: CloudContext) -> Cloud:
    """Make the driver of an account, with the abilities that its provider has.

    Raises CloudRefusedError for a provider that libcloud does not know, or passes no user data to.
    """
    if settings.provider == "openstack":
        return OpenStackCloud(settings, context, OpenStack(settings, context.deployment))
    if settings.provider == "ec2":
        return LibcloudDisks(settings, context, Ec2(settings, context.deployment))
    if settings.provider in DIALECTS:
        return LibcloudCloud(settings, context, Named(DIALECTS[settings.provider], settings, context.deployment))
    known = settings.provider in DRIVERS
    raise CloudRefusedError(
        f"libcloud passes no user data to instances of '{settings.provider}': they could not learn who they are"
        if known
        else f"libcloud knows no provider '{settings.provider}'",
        value=settings.provider,
        hint=f"these can be used: {', '.join(sorted(USABLE))}",
    )
