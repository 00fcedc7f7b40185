"""OpenStack through libcloud."""

import json
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from libcloud.common.openstack_identity import OpenStackAuthenticationCache
from libcloud.compute.drivers.openstack import OpenStackNetwork, OpenStackSecurityGroup
from libcloud.compute.types import NodeState

from conpaas.cloud._libcloud_errors import is_code
from conpaas.cloud._libcloud_ports import Way
from conpaas.cloud._libcloud_provider import DEPLOYMENT_TAG, GIB, MIB, TOKEN_TAG, DiskProvider, marks
from conpaas.cloud._libcloud_threads import Call
from conpaas.cloud.libcloud import LibcloudSettings
from conpaas.core.cloud import Room, VmRequest, Volume, VolumeState


class _Logins(OpenStackAuthenticationCache):
    """Tokens of the identity service, shared by the threads of one account."""

    def __init__(self) -> None:
        self._contexts: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        return self._contexts.get(key)

    def put(self, key: Any, context: Any) -> None:
        self._contexts[key] = context

    def clear(self, key: Any) -> None:
        self._contexts.pop(key, None)


class OpenStack(DiskProvider):
    """OpenStack by version 3 of its identity service and 2 of its compute service."""

    renews = True

    def __init__(self, settings: LibcloudSettings, deployment: str) -> None:
        super().__init__(settings, deployment)
        self._logins = _Logins()

    def open(self) -> Any:
        driver = super().open()
        if "ex_force_service_name" not in self.settings.options:
            # A service is found by its type: its name is up to the site.
            for connection in (
                driver.connection,
                driver.image_connection,
                driver.network_connection,
                driver.volumev3_connection,
            ):
                connection.service_name = None
        # libcloud tries version 3 first, and takes any failure of it, also of the login, as a word for version 2.
        driver.volume_connection = driver.volumev3_connection
        return driver

    def constructor(self) -> dict[str, Any]:
        settings = self.settings
        words = {
            "api_version": "2.2",
            "secure": not settings.url.startswith("http:"),
            "ex_force_auth_url": re.sub(r"/+(v3/*)?$", "", settings.url),  # libcloud adds the version itself
            "ex_force_auth_version": "3.x_password",
            "ex_tenant_name": settings.project,
            "ex_domain_name": settings.domain,
            "ex_force_service_region": settings.region,
            "ex_auth_cache": self._logins,
        }
        return {name: word for name, word in words.items() if word != "" and name not in settings.options}

    def problem(self) -> str:
        if not self.settings.url:
            return "no url is set: that of the identity service (Keystone)"
        return super().problem()

    def node(self, driver: Any, vm: str) -> Any:
        return driver.ex_get_node_details(vm)

    def token(self, node: Any) -> str:
        metadata = node.extra["metadata"]
        return str(metadata.get(TOKEN_TAG, "")) if metadata.get(DEPLOYMENT_TAG) == self.deployment else ""

    def create(self, driver: Any, request: VmRequest, size: Any, zone: str) -> Any:
        settings = self.settings
        return driver.create_node(
            name=request.name[:255],
            size=size,
            image=self.image(driver),
            ex_userdata=request.context(""),
            ex_metadata=marks(self.deployment, request),
            ex_keyname=settings.key_name or None,
            ex_availability_zone=zone or None,
            networks=[OpenStackNetwork(network, None, None, driver) for network in settings.networks],  # type: ignore[no-untyped-call]
            ex_security_groups=[
                OpenStackSecurityGroup(None, None, name, None, driver)  # type: ignore[no-untyped-call]
                for name in settings.security_groups
            ],
        )

    def made(self, call: Call) -> str | None:
        """Find the id in the answer to the request that made it: libcloud asks once more, and that may fail."""
        for answer in call.changes:
            try:
                return str(json.loads(answer)["server"]["id"])
            except (ValueError, KeyError, TypeError):
                continue  # a login
        return None

    def state(self, node: Any) -> Any:
        if node.extra.get("task_state") == "deleting":
            return NodeState.TERMINATED
        if node.state == NodeState.UNKNOWN:
            return _STATES.get(str(node.extra.get("vm_state")), node.state)
        return node.state

    def reason(self, node: Any) -> str:
        fault = node.extra.get("fault") or {}
        return str(fault.get("message") or node.extra.get("vm_state") or node.state)

    def size_of(self, node: Any, names: Mapping[str, str]) -> str:
        details = node.extra.get("flavor_details") or {}
        name = details.get("original_name")  # newer ones say this, and no id
        return str(name or names.get(str(details.get("id")), details.get("id") or ""))

    def zone_of(self, node: Any) -> str:
        return str(node.extra.get("availability_zone") or "")

    def size_name(self, size: Any) -> str:
        return str(size.name)

    def zones(self, driver: Any) -> list[str]:
        found = driver.connection.request("/os-availability-zone").object["availabilityZoneInfo"]
        return [zone["zoneName"] for zone in found if zone["zoneState"]["available"]]

    def is_own(self, image: Any) -> bool:
        return image.extra.get("visibility") in ("private", "shared")

    def has_image(self, driver: Any) -> bool:
        try:
            return bool(driver.get_image(self.settings.image).extra.get("status") == "active")
        except Exception as exc:
            if is_code(exc, 400, 404):
                return False
            raise

    def missing(self, driver: Any) -> list[str]:
        settings, found = self.settings, []
        if settings.networks:
            there = {network.id for network in driver.ex_list_networks()}
            found += [f"network {network}" for network in settings.networks if network not in there]
        if settings.security_groups:
            groups = driver.ex_list_security_groups()
            there = {group.name for group in groups} | {group.id for group in groups}
            found += [f"security group {group}" for group in settings.security_groups if group not in there]
        if settings.key_name and settings.key_name not in {key.name for key in driver.list_key_pairs()}:
            found.append(f"key {settings.key_name}")
        return found

    def ways(self, driver: Any) -> list[Way] | None:
        """Read the rules as they are: libcloud's take all of them for rules about what comes in."""
        try:
            groups = driver.network_connection.request("/v2.0/security-groups").object["security_groups"]
        except Exception as exc:
            if is_code(exc, 404):
                return None  # this network service has no security groups
            raise
        networks = driver.network_connection.request("/v2.0/networks").object["networks"]
        ours = [network for network in networks if network["id"] in self.settings.networks]
        if ours and not any(network.get("port_security_enabled", True) for network in ours):
            return [Way(0, 65535, outside=True)]
        names = self.settings.security_groups or ("default",)
        return [
            Way(rule.get("port_range_min") or 0, rule.get("port_range_max") or 65535, not rule.get("remote_group_id"))
            for group in groups
            if group["name"] in names or group["id"] in names
            for rule in group["security_group_rules"]
            if rule["direction"] == "ingress" and rule.get("protocol") in _TCP
        ]

    def quota(self, driver: Any) -> list[Room]:
        """Return the compute service's limits; -1 is none."""
        limits = driver.connection.request("/limits").object["limits"]["absolute"]
        rooms = (
            ("instances", "totalInstancesUsed", "maxTotalInstances", 1),
            ("cores", "totalCoresUsed", "maxTotalCores", 1),
            ("memory", "totalRAMUsed", "maxTotalRAMSize", MIB),
        )
        return [
            Room(name=name, used=float(limits[used] * unit), limit=float(limits[limit] * unit))
            for name, used, limit, unit in rooms
            if limits[limit] >= 0
        ]

    # Volumes

    def volumes(self, driver: Any) -> Iterable[Any]:
        found: list[Any] = driver.list_volumes()
        return found

    def volume(self, driver: Any, volume: str) -> Any:
        try:
            return driver.ex_get_volume(volume)
        except Exception as exc:
            if is_code(exc, 404):
                return None
            raise

    def create_volume(self, driver: Any, name: str, gib: int, zone: str) -> str:
        kind = self.settings.volume_type or None
        return str(driver.create_volume(gib, name, location=zone or None, ex_volume_type=kind).id)

    def attach(self, driver: Any, volume: Any, node: Any) -> None:
        driver.attach_volume(node, volume)

    def look(self, volume: Any, token: str) -> Volume:
        attachments = [found for found in volume.extra["attachments"] if found.get("server_id")]
        raw = str(volume.extra["state"])
        return Volume(
            id=str(volume.id),
            token=token,
            state=_VOLUME_STATES.get(raw, VolumeState.PENDING),
            size=int(volume.size) * GIB,
            zone=str(volume.extra.get("location") or ""),
            vm=str(attachments[0]["server_id"]) if attachments else None,
            # Disks of virtio tell the first 20 characters of the volume's id as their serial number.
            devices=(
                (f"/dev/disk/by-id/virtio-{volume.id[:20]}", str(attachments[0].get("device") or "/dev/vdb"))
                if attachments
                else ()
            ),
            reason=raw if raw.startswith("error") else "",
        )


_TCP = (None, "any", "tcp", "6", 6)
_STATES = MappingProxyType(
    {
        "active": NodeState.RUNNING,
        "paused": NodeState.PAUSED,
        "shelved": NodeState.STOPPED,
        "shelved_offloaded": NodeState.STOPPED,
        "soft-delete": NodeState.TERMINATED,
        "deleted": NodeState.TERMINATED,
    }
)
"""Of states that libcloud does not know, such as MIGRATING."""
_VOLUME_STATES = MappingProxyType(
    {
        "available": VolumeState.AVAILABLE,
        "in-use": VolumeState.ATTACHED,
        "deleting": VolumeState.GONE,
        "error": VolumeState.FAILED,
        "error_deleting": VolumeState.FAILED,
    }
)
