"""Where a service is and where it can go, as its page shows it. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.messages.public import CloudView
from conpaas.core.states import NodeState
from conpaas.web.words import plural


@dataclass(frozen=True)
class Choice:
    """A cloud to choose."""

    cloud: CloudView
    chosen: bool = False
    size: str = ""
    """The size that is chosen there."""
    fate: str = ""
    """What will happen if it is chosen."""


@dataclass(frozen=True)
class Places:
    """The clouds of a service."""

    titles: Mapping[str, str]
    here: str
    """Titles of the clouds that it is on: `Local and Amazon EC2`."""
    choices: Sequence[Choice]
    """Where it can move."""
    scale: Sequence[str]
    """Names of the clouds to add nodes to, or remove some from; empty if there is but one."""

    @property
    def can_move(self) -> bool:
        """Whether there is another cloud, or another size."""
        return len(self.choices) > 1 or any(len(choice.cloud.sizes) > 1 for choice in self.choices)


def choices(clouds: Sequence[CloudView]) -> list[Choice]:
    """Return the clouds to choose from for a new service: the default one is chosen, else the first that is open."""
    open_ = [cloud.name for cloud in clouds if cloud.enabled]
    chosen = next((cloud.name for cloud in clouds if cloud.default and cloud.enabled), next(iter(open_), None))
    return [Choice(cloud, cloud.name == chosen, default_size(cloud)) for cloud in clouds]


def places(service: ServiceView, clouds: Sequence[CloudView]) -> Places:
    """Return where a service is and can go."""
    titles = {cloud.name: cloud.title for cloud in clouds}
    alive = [node for node in service.nodes if node.state is not NodeState.GONE]
    here = list(dict.fromkeys((service.cloud, *(node.cloud for node in alive))))
    open_ = [cloud for cloud in clouds if cloud.enabled or cloud.name == service.cloud]
    scale = list(dict.fromkeys((*(cloud.name for cloud in clouds if cloud.enabled), *here)))
    return Places(
        titles=titles,
        here=_together([titles.get(name, name) for name in here]),
        choices=[
            Choice(cloud, cloud.name == service.cloud, _size(service, cloud), fate(service, alive, cloud))
            for cloud in open_
        ],
        scale=scale if len(scale) > 1 else [],
    )


def fate(service: ServiceView, alive: Sequence[NodeView], cloud: CloudView) -> str:
    """Say in a sentence or two what follows if the service is moved to `cloud`."""
    leaving = sum(node.cloud != cloud.name for node in alive)
    if not service.wanted.running:
        if leaving:
            return f"Its manager moves to {cloud.title} now; its instances are made there when it is started."
        return "It is there already; instances of the chosen size are made when it is started."
    if not leaving:
        return "All of it is there already. With another size, its instances are replaced by new ones while it serves."
    return (
        f"{plural(leaving, 'new instance')} {'is' if leaving == 1 else 'are'} made on {cloud.title}. When all of them "
        "answer they take over, and those elsewhere are given back; until then both are paid for. It serves all along."
    )


def default_size(cloud: CloudView) -> str:
    """Return the name of a cloud's default size; empty if it has none to choose."""
    return next((size.name for size in cloud.sizes if size.default), "")


def _size(service: ServiceView, cloud: CloudView) -> str:
    return service.wanted.sizes.get(cloud.name) or default_size(cloud)


def _together(names: Sequence[str]) -> str:
    """Return `A`, `A and B`, `A, B and C`."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
