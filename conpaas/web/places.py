"""Where a service is and where it can go, as its page shows it. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.messages.public import CloudView, SizeView
from conpaas.core.states import NodeState
from conpaas.web.words import plural

_FALLBACKS = 3
"""So many clouds can be chosen to take what a cloud refuses, unless more are chosen already."""


@dataclass(frozen=True)
class Choice:
    """A cloud to choose."""

    cloud: CloudView
    title: str
    chosen: bool = False
    size: str = ""
    """The size that is chosen there."""
    fate: str = ""
    """What will happen if it is chosen."""


@dataclass(frozen=True)
class Fallback:
    """The clouds that take what the chosen one refuses, in their order."""

    chosen: Sequence[str]
    """Their names, a field each; empty: nobody."""
    offered: Mapping[str, str]
    """Titles by name."""


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
    fallback: Fallback
    machines: Mapping[str, SizeView]
    """What a new instance would be, by cloud; clouds that do not tell are left out."""

    @property
    def can_move(self) -> bool:
        """Whether there is another cloud, or another size."""
        return len(self.choices) > 1 or any(len(choice.cloud.sizes) > 1 for choice in self.choices)


def choices(clouds: Sequence[CloudView]) -> list[Choice]:
    """Return the clouds to choose from for a new service: the default one is chosen, else the first that is open."""
    open_ = [cloud.name for cloud in clouds if cloud.enabled]
    chosen = next((cloud.name for cloud in clouds if cloud.default and cloud.enabled), next(iter(open_), None))
    names = titles(clouds)
    return [Choice(cloud, names[cloud.name], cloud.name == chosen, default_size(cloud)) for cloud in clouds]


def titles(clouds: Sequence[CloudView]) -> dict[str, str]:
    """Return the clouds' titles by name; where several have the same one, with their names."""
    count = Counter(cloud.title for cloud in clouds)
    return {cloud.name: cloud.title if count[cloud.title] == 1 else f"{cloud.title} ({cloud.name})" for cloud in clouds}


def fallback(clouds: Sequence[CloudView], wanted: Sequence[str] = ()) -> Fallback:
    """Return what to choose from, and what is chosen: a closed cloud is only offered where it is wanted already."""
    names = titles(clouds)
    offered = dict.fromkeys((*(cloud.name for cloud in clouds if cloud.enabled), *wanted))
    count = max(min(len(offered) - 1, _FALLBACKS), len(wanted))
    return Fallback([*wanted, *[""] * (count - len(wanted))], {name: names.get(name, name) for name in offered})


def read_fallback(chosen: Sequence[str], cloud: str) -> list[str]:
    """Return the chosen clouds in their order, each once; `cloud` itself cannot take what it refuses."""
    return [name for name in dict.fromkeys(chosen) if name not in {"", cloud}]


def places(service: ServiceView, clouds: Sequence[CloudView]) -> Places:
    """Return where a service is and can go."""
    names = titles(clouds)
    alive = [node for node in service.nodes if node.state is not NodeState.GONE]
    here = list(dict.fromkeys((service.cloud, *(node.cloud for node in alive))))
    open_ = [cloud for cloud in clouds if cloud.enabled or cloud.name == service.cloud]
    scale = list(dict.fromkeys((*(cloud.name for cloud in clouds if cloud.enabled), *here)))
    return Places(
        titles=names,
        here=_together([names.get(name, name) for name in here]),
        choices=[
            Choice(
                cloud,
                names[cloud.name],
                cloud.name == service.cloud,
                _size(service, cloud),
                fate(service, alive, cloud, names[cloud.name]),
            )
            for cloud in open_
        ],
        scale=scale if len(scale) > 1 else [],
        fallback=fallback(clouds, service.wanted.fallback),
        machines={cloud.name: size for cloud in clouds for size in cloud.sizes if size.name == _size(service, cloud)},
    )


def fate(service: ServiceView, alive: Sequence[NodeView], cloud: CloudView, title: str) -> str:
    """Say in a few sentences what follows if the service is moved to `cloud`."""
    leaving = sum(node.cloud != cloud.name for node in alive)
    if not service.wanted.running:
        if leaving:
            return f"Its manager moves to {title} now; its instances are made there when it is started."
        return "It is there already; instances of the chosen size are made when it is started."
    if not leaving:
        return "All of it is there already. With another size, its instances are replaced by new ones while it serves."
    return (
        f"{plural(leaving, 'new instance')} {'is' if leaving == 1 else 'are'} made on {title}. When all of them "
        "answer they take over, and those elsewhere are given back; until then both are paid for. It serves all along, "
        "but its address changes."
    )


def default_size(cloud: CloudView) -> str:
    """Return the name of a cloud's default size; empty if it has none to choose."""
    return next((size.name for size in cloud.sizes if size.default), "")


def _size(service: ServiceView, cloud: CloudView) -> str:
    return service.wanted.sizes.get(cloud.name) or default_size(cloud)


def _together(names: Sequence[str]) -> str:
    """Return `A`, `A and B`, `A, B and C`."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
