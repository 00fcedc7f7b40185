"""Deadlines and periods of managers and agents: settings of the director, handed to each instance with its context."""

from pydantic import Field, PositiveFloat

from conpaas.core.messages.base import Message


class Timings(Message):
    """How long things may take, in seconds."""

    node_boot_timeout_s: PositiveFloat = 300.0
    """How long a new instance may take to answer before it is deleted and replaced."""
    boot_poll_s: PositiveFloat = 0.02
    """First pause between two questions to a booting node; it grows to fifty times that, with jitter."""
    health_period_s: PositiveFloat = 2.0
    """How often the manager asks each node how it is."""
    node_silent_s: PositiveFloat = 10.0
    """How long a node may be silent before it is replaced, if its cloud says that it still exists."""
    apply_timeout_s: PositiveFloat = 120.0
    """How long a node may take to apply one stage."""
    drain_s: float = Field(default=10.0, ge=0)
    """How long a role may go on serving what it has begun when it is stopped."""
    handover_s: float = Field(default=10.0, ge=0)
    """How long nodes that have been replaced go on beside their successors: so long may the old address be known."""
    script_timeout_s: PositiveFloat = 60.0
    """How long a user's start or stop script may run."""
    metrics_period_s: PositiveFloat = 5.0
    """How often metrics are taken and reported."""
    retry_delays_s: tuple[PositiveFloat, ...] = (1.0, 2.0, 5.0, 15.0, 60.0)
    """Pauses between attempts to reach what is wanted; the last one repeats."""
