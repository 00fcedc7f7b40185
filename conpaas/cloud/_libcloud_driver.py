"""The driver of the clouds that apache-libcloud speaks to: which of its classes is whose."""

from conpaas.cloud._libcloud_cloud import LibcloudCloud
from conpaas.cloud._libcloud_ec2 import Ec2
from conpaas.cloud._libcloud_named import DIALECTS, Named
from conpaas.cloud._libcloud_openstack import OpenStack
from conpaas.cloud._libcloud_provider import Unusable
from conpaas.cloud._libcloud_volumes import LibcloudDisks, OpenStackCloud
from conpaas.cloud.libcloud import LibcloudSettings
from conpaas.core.cloud import Cloud, CloudContext

USABLE = ("openstack", "ec2", *DIALECTS)


def driver(settings: LibcloudSettings, context: CloudContext) -> Cloud:
    """Make the driver of an account, with the abilities that its provider has."""
    if settings.provider == "openstack":
        return OpenStackCloud(settings, context, OpenStack(settings, context.deployment))
    if settings.provider == "ec2":
        return LibcloudDisks(settings, context, Ec2(settings, context.deployment))
    if settings.provider in DIALECTS:
        return LibcloudCloud(settings, context, Named(DIALECTS[settings.provider], settings, context.deployment))
    return LibcloudCloud(settings, context, Unusable(settings, context.deployment, usable=USABLE))
