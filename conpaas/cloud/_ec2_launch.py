"""What an instance is launched with."""

from typing import Any

from conpaas.cloud._ec2_account import Ami, Subnet
from conpaas.cloud.ec2 import Ec2Settings


def parameters(settings: Ec2Settings, subnet: Subnet, ami: Ami, size: str, groups: list[str]) -> dict[str, Any]:
    """Return the parameters of RunInstances that do not depend on whom the instance is for."""
    chosen: dict[str, Any] = {
        "ImageId": ami.id,
        "InstanceType": size or settings.size,
        "MinCount": 1,
        "MaxCount": 1,
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled", "HttpPutResponseHopLimit": 1},
        "NetworkInterfaces": [
            {
                "DeviceIndex": 0,
                "SubnetId": subnet.id,
                "Groups": groups,
                "AssociatePublicIpAddress": settings.address != "private",
                "DeleteOnTermination": True,
            }
        ],
    }
    if ami.root:
        chosen["BlockDeviceMappings"] = [{"DeviceName": ami.root, "Ebs": _disk(settings, ami)}]
    if settings.key_pair:
        chosen["KeyName"] = settings.key_pair
    if settings.spot:
        chosen["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": _spot(settings)}
    return chosen


def _disk(settings: Ec2Settings, ami: Ami) -> dict[str, Any]:
    disk: dict[str, Any] = {"VolumeType": "gp3", "DeleteOnTermination": True}
    if settings.encrypted:
        disk["Encrypted"] = True  # False would be refused where the image's own disk is encrypted
    if size := max(settings.disk_gib, ami.disk_gib):
        disk["VolumeSize"] = size
    return disk


def _spot(settings: Ec2Settings) -> dict[str, Any]:
    options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
    if settings.spot_max_price is not None:
        options["MaxPrice"] = str(settings.spot_max_price)
    return options
