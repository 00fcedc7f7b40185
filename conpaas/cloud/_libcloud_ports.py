"""Which ports must be let in, and whether they are. libcloud has no common words for opening them: people do it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conpaas.core import plugins, service
from conpaas.core.messages.internal import MEMBER_PORT


@dataclass(frozen=True)
class Way:
    """TCP ports that instances can be reached at, and whether from anywhere but other instances."""

    first: int
    last: int
    outside: bool


@dataclass(frozen=True)
class Needed:
    """The ports of instances, whatever service they are of."""

    outer: tuple[int, ...]
    """For people and the director."""
    inner: tuple[int, ...]
    """For the other instances; these use the outer ones too."""

    def __str__(self) -> str:
        outer, inner = (", ".join(map(str, ports)) for ports in (self.outer, self.inner))
        return f"TCP {outer} from people, the director and the instances; {inner} from the instances"

    def shut(self, ways: Sequence[Way]) -> "Needed":
        """Return those of the ports that no way leads to."""
        return Needed(
            outer=tuple(port for port in self.outer if not _leads(port, (way for way in ways if way.outside))),
            inner=tuple(port for port in self.inner if not _leads(port, ways)),
        )


def needed() -> Needed:
    """Return the ports of all service types, and our own."""
    kinds = plugins.discover(service.PACKAGE, "SERVICE", service.ServiceType).values()
    outer = {MEMBER_PORT, *(port for kind in kinds for port in kind.ports)}
    inner = {port for kind in kinds for port in kind.inner_ports} - outer
    return Needed(tuple(sorted(outer)), tuple(sorted(inner)))


def _leads(port: int, ways: Iterable[Way]) -> bool:
    return any(way.first <= port <= way.last for way in ways)
