"""Amazon EC2 through libcloud."""

import hashlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from libcloud.compute.drivers.ec2 import EC2NetworkSubnet, EC2NodeLocation, ExEC2AvailabilityZone
from libcloud.compute.types import NodeState

from conpaas.cloud._libcloud_provider import DEPLOYMENT_TAG, GIB, TOKEN_TAG, DiskProvider, marks
from conpaas.cloud._libcloud_threads import Call
from conpaas.core.cloud import VmRequest, Volume, VolumeState
from conpaas.core.errors import CloudRefusedError

_DEVICES = [f"/dev/sd{letter}" for letter in "fghijklmnop"]  # those that Amazon recommends for volumes


class Ec2(DiskProvider):
    """Amazon EC2 through libcloud. The driver `ec2` does more; this is for clouds that speak an older EC2 only."""

    def constructor(self) -> dict[str, Any]:
        url = urlsplit(self.settings.url)
        words: dict[str, Any] = {"region": self.settings.region or "us-east-1", "signature_version": "4"}
        if self.settings.url:
            words |= {"secure": url.scheme == "https", "host": url.hostname}
            words |= {"port": url.port} if url.port else {}
        return {name: word for name, word in words.items() if name not in self.settings.options}

    def problem(self) -> str:
        if len(self.settings.networks) > 1:
            return "an instance can be in one subnet only: name one network"
        return super().problem()

    def nodes(self, driver: Any, token: str = "") -> Iterable[Any]:
        filters = {f"tag:{DEPLOYMENT_TAG}": self.deployment} | ({f"tag:{TOKEN_TAG}": token} if token else {})
        nodes: Iterable[Any] = driver.list_nodes(ex_filters=filters)
        return nodes

    def node(self, driver: Any, vm: str) -> Any:
        found = driver.list_nodes(ex_filters={"instance-id": vm})
        return found[0] if found else None

    def token(self, node: Any) -> str:
        tags = node.extra["tags"]
        return str(tags.get(TOKEN_TAG, "")) if tags.get(DEPLOYMENT_TAG) == self.deployment else ""

    def create(self, driver: Any, request: VmRequest, size: Any, zone: str) -> Any:
        groups = list(self.settings.security_groups) or None
        subnet = self.settings.networks[0] if self.settings.networks else ""
        placed: dict[str, Any] = {"ex_security_groups": groups}
        if subnet:
            placed = {
                "ex_subnet": EC2NetworkSubnet(subnet, subnet, "available"),  # type: ignore[no-untyped-call]
                "ex_security_group_ids": groups,
            }
        return driver.create_node(
            name=request.name[:255],
            size=size,
            image=self.image(driver),
            location=self._location(driver, zone) if zone else None,
            ex_userdata=request.context(""),
            ex_metadata=marks(self.deployment, request),
            ex_keyname=self.settings.key_name or None,
            ex_clienttoken=hashlib.sha256(f"{self.deployment}/{request.token}".encode()).hexdigest(),
            **placed,
        )

    def made(self, call: Call) -> str | None:  # noqa: ARG002
        """It is one request, which says in its own answer whether it has failed."""
        return None

    def state(self, node: Any) -> Any:
        return NodeState.TERMINATED if node.extra.get("status") == "shutting-down" else node.state

    def reason(self, node: Any) -> str:
        return str(node.extra.get("status") or node.state)

    def size_of(self, node: Any, names: Mapping[str, str]) -> str:  # noqa: ARG002
        return str(node.extra.get("instance_type") or "")

    def zone_of(self, node: Any) -> str:
        return str(node.extra.get("availability") or "")

    def zones(self, driver: Any) -> list[str]:
        return [zone.name for zone in driver.ex_list_availability_zones()]

    def images(self, driver: Any) -> list[Any]:
        return list(driver.list_images(ex_owner="self"))

    def has_image(self, driver: Any) -> bool:
        found = driver.list_images(ex_filters={"image-id": self.settings.image})
        return any(image.extra.get("state") == "available" for image in found)

    def missing(self, driver: Any) -> list[str]:
        settings, found = self.settings, []
        groups = list(settings.security_groups)
        if groups:  # what is not there is an error, in the provider's words
            driver.ex_get_security_groups(**{"group_ids" if settings.networks else "group_names": groups})
        if settings.networks:
            driver.ex_list_subnets(subnet_ids=list(settings.networks))
        if settings.key_name and settings.key_name not in {key.name for key in driver.list_key_pairs()}:
            found.append(f"key {settings.key_name}")
        return found

    def _location(self, driver: Any, zone: str) -> EC2NodeLocation:
        place = ExEC2AvailabilityZone(zone, "available", driver.region_name)  # type: ignore[no-untyped-call]
        return EC2NodeLocation(zone, zone, driver.country, driver, place)  # type: ignore[no-untyped-call]

    # Volumes

    def volumes(self, driver: Any) -> Iterable[Any]:
        found: list[Any] = driver.list_volumes(ex_filters={"tag:Name": f"{self.prefix}*"})
        return found

    def volume(self, driver: Any, volume: str) -> Any:
        found = driver.list_volumes(ex_filters={"volume-id": volume})
        return found[0] if found else None

    def create_volume(self, driver: Any, name: str, gib: int, zone: str) -> str:
        """Make a volume with its name in one request. libcloud gives it one in a second: a crash between is a leak."""
        params = {
            "Action": "CreateVolume",
            "Size": str(gib),
            "AvailabilityZone": zone or self.zones(driver)[0],
            "VolumeType": self.settings.volume_type or "gp3",
            "TagSpecification.1.ResourceType": "volume",
            "TagSpecification.1.Tag.1.Key": "Name",
            "TagSpecification.1.Tag.1.Value": name,
        }
        answer = driver.connection.request(driver.path, params=params).object
        return next(str(element.text) for element in answer.iter() if element.tag.endswith("volumeId"))

    def attach(self, driver: Any, volume: Any, node: Any) -> None:
        taken = {str(mapping["device_name"]) for mapping in node.extra["block_device_mapping"]}
        free = next((device for device in _DEVICES if device not in taken), None)
        if free is None:
            raise CloudRefusedError(f"instance {node.id} has {len(_DEVICES)} volumes already", value=node.id)
        driver.attach_volume(node, volume, free)

    def look(self, volume: Any, token: str) -> Volume:
        extra = volume.extra
        attachment = str(extra.get("attachment_status") or "")
        state = _VOLUME_STATES.get(str(extra["state"]), VolumeState.PENDING)
        if state is VolumeState.ATTACHED and attachment in {"attaching", "detaching"}:
            state = VolumeState.PENDING
        device = str(extra.get("device") or "")
        serial = str(volume.id).replace("-", "")
        return Volume(
            id=str(volume.id),
            token=token,
            state=state,
            size=int(volume.size) * GIB,
            zone=str(extra.get("zone") or ""),
            vm=extra.get("instance_id") or None,
            devices=(
                (
                    f"/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{serial}",
                    device.replace("/sd", "/xvd"),
                    device,
                )
                if device
                else ()
            ),
            reason=str(extra["state"]) if state is VolumeState.FAILED else "",
        )


_VOLUME_STATES = MappingProxyType(
    {
        "available": VolumeState.AVAILABLE,
        "in-use": VolumeState.ATTACHED,
        "deleting": VolumeState.GONE,
        "deleted": VolumeState.GONE,
        "error": VolumeState.FAILED,
    }
)
