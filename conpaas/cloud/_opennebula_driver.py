"""The driver of an account at an OpenNebula."""

from conpaas.cloud._opennebula_instances import OpenNebula
from conpaas.cloud._opennebula_volumes import OpenNebulaWithVolumes
from conpaas.cloud.opennebula import OpenNebulaSettings
from conpaas.core.cloud import Cloud, CloudContext


def open_account(settings: OpenNebulaSettings, context: CloudContext) -> Cloud:
    """Return the driver: it has volumes if there is a datastore for them."""
    return (OpenNebula if settings.datastore is None else OpenNebulaWithVolumes)(settings, context)
