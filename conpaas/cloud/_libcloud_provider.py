"""How a provider is spoken to through libcloud: what `create_node` takes, and where what it was given is found again.

libcloud gives all providers one interface only for the plainest things. Everything that a driver's promises rest on
lies in the provider's own extensions: user data, tags, networks. A provider that is not described cannot be used.

Instances bear our marks, deployment and token, in their metadata where the provider takes it with the request that
creates; else, and volumes everywhere, in their name.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, ClassVar

from libcloud.common.types import LibcloudError
from libcloud.compute import providers
from libcloud.compute.base import NodeImage

from conpaas.cloud._libcloud_ports import Way
from conpaas.cloud._libcloud_threads import Call
from conpaas.cloud.libcloud import LibcloudSettings
from conpaas.core.cloud import VmRequest, Volume
from conpaas.core.errors import CloudRefusedError

DEPLOYMENT_TAG, TOKEN_TAG = "conpaas-deployment", "conpaas-token"
GIB, MIB = 1 << 30, 1 << 20


def name_prefix(deployment: str) -> str:
    """Return what the names of a deployment's things begin with: nothing that only begins alike bears it.

    Made for the strictest of the providers: letters, digits and single hyphens.
    """
    return f"conpaas-{hashlib.sha256(deployment.encode()).hexdigest()[:10]}-"


class Provider(ABC):
    """One provider, spoken to for one deployment. The methods that take a driver object are called in threads."""

    renews: ClassVar[bool] = False
    """Logs in for a token, which may end before the credentials do."""

    def __init__(self, settings: LibcloudSettings, deployment: str) -> None:
        self.settings, self.deployment = settings, deployment
        self.prefix = name_prefix(deployment)

    def open(self) -> Any:
        """Return a driver object; it has asked nothing yet."""
        credentials = [word for word in (self.settings.key, self.settings.secret.get_secret_value()) if word]
        try:
            kind: Any = providers.get_driver(self.settings.provider)
            return kind(*credentials, **self.constructor(), **self.settings.options)
        except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError, LibcloudError) as exc:
            raise CloudRefusedError(
                f"libcloud cannot open a '{self.settings.provider}' with these settings: {exc}",
                hint="an administrator must correct them: 'conpaas cloud edit'",
            ) from exc

    def constructor(self) -> dict[str, Any]:
        """Return parameters of libcloud's driver, but for credentials and the settings' own options."""
        return {}

    def problem(self) -> str:
        """Say why no instance can be made with these settings, whatever the provider says; empty if it can."""
        return ""

    # Instances

    def nodes(self, driver: Any, token: str = "") -> Iterable[Any]:  # noqa: ARG002 - for those that can search
        """Return at least the nodes of this deployment, or those of one token."""
        nodes: Iterable[Any] = driver.list_nodes()
        return nodes

    def node(self, driver: Any, vm: str) -> Any:
        """Return the node with an id, None if there is none."""
        return next((node for node in self.nodes(driver) if str(node.id) == vm), None)

    def token(self, node: Any) -> str:
        """Return the token that a node was made for; empty if it is not ours."""
        return self.token_in(node.name)

    def token_in(self, name: str | None) -> str:
        """Return the token that a name holds; empty if it is none of this deployment."""
        return name[len(self.prefix) :] if name and name.startswith(self.prefix) else ""

    @abstractmethod
    def create(self, driver: Any, request: VmRequest, size: Any, zone: str) -> Any:
        """Make a node."""

    def made(self, call: Call) -> str | None:
        """Return what is known of the node of a failed `create`: its id, empty if there may be one, None if not."""
        return "" if call.changes else None

    def state(self, node: Any) -> Any:
        """Return a node's state, as libcloud names states; TERMINATED also if that was only promised."""
        return node.state

    def reason(self, node: Any) -> str:
        """Return the provider's words about a node's state."""
        return str(node.extra.get("status") or node.state)

    def size_of(self, node: Any, names: Mapping[str, str]) -> str:  # noqa: ARG002 - most know the name
        """Return the name of a node's size; `names` are those of the sizes, by id."""
        return str(node.size.id) if node.size is not None else ""

    def zone_of(self, node: Any) -> str:  # noqa: ARG002 - most have none
        """Return where a node is."""
        return ""

    # What there is

    def size_name(self, size: Any) -> str:
        """Return what the provider calls a size."""
        return str(size.id)

    def price(self, size: Any) -> Decimal | None:
        """Return what a size costs per hour."""
        return Decimal(str(size.price)) if size.price and float(size.price) > 0 else None

    def disk(self, size: Any) -> int:
        """Return how large a size's disk is, in bytes."""
        return int(float(size.disk or 0) * GIB)

    def cores(self, size: Any) -> float:
        """Return how many cores a size has; 1 if libcloud does not say."""
        extra = getattr(size, "extra", None) or {}
        found = (extra.get(name) for name in ("vcpus", "vcpu", "cpu", "vcpu_count"))
        return float(getattr(size, "vcpus", None) or next((count for count in found if count), 1))

    def zones(self, driver: Any) -> list[str]:
        """Return the ids of all places."""
        return [str(location.id) for location in driver.list_locations()]

    def images(self, driver: Any) -> list[Any]:
        """Return the account's own images."""
        return [image for image in driver.list_images() if self.is_own(image)]

    def is_own(self, image: Any) -> bool:
        """Tell whether an image is the account's own, not one that the provider offers to everybody."""
        return image.extra.get("public", image.extra.get("is_public", True)) in (False, "false")

    def has_image(self, driver: Any) -> bool:
        """Tell whether the image of the settings is there and ready."""
        return any(str(image.id) == self.settings.image for image in driver.list_images())

    def missing(self, driver: Any) -> list[str]:  # noqa: ARG002 - only a few can tell
        """Describe what else the settings name and the provider does not have."""
        return []

    def ways(self, driver: Any) -> Sequence[Way] | None:  # noqa: ARG002 - only a few can tell
        """Return the ways that the settings' security groups leave open; None if that cannot be known."""
        return None

    def image(self, driver: Any) -> Any:
        """Return the image of the settings, without a look at it."""
        return NodeImage(id=self.settings.image, name=self.settings.image, driver=driver)


class DiskProvider(Provider):
    """A provider that keeps what instances print, and has volumes that we know how to find."""

    def console(self, driver: Any, node: Any) -> str:
        """Return what a node has printed."""
        return str(driver.ex_get_console_output(node).get("output") or "")

    @abstractmethod
    def volumes(self, driver: Any) -> Iterable[Any]:
        """Return at least the volumes of this deployment."""

    @abstractmethod
    def volume(self, driver: Any, volume: str) -> Any:
        """Return the volume with an id, None if there is none."""

    @abstractmethod
    def create_volume(self, driver: Any, name: str, gib: int, zone: str) -> str:
        """Make a volume; return its id."""

    @abstractmethod
    def attach(self, driver: Any, volume: Any, node: Any) -> None:
        """Ask for a volume to be attached."""

    @abstractmethod
    def look(self, volume: Any, token: str) -> Volume:
        """Return a volume as it is."""


def marks(deployment: str, request: VmRequest) -> dict[str, str]:
    """Return the metadata of an instance."""
    tags = {f"conpaas-{name}": value[:255] for name, value in request.tags.items()}
    return tags | {DEPLOYMENT_TAG: deployment, TOKEN_TAG: request.token}
