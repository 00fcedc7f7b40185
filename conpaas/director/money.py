"""Money: a credit is one instance for up to one hour, its manager's included.

An hour is charged when it begins: the first one with the intent to make the instance, the others once their beginning
has passed. Entries are unique by instance and hour, and a user's balance changes in the transaction of its entry: what
a crash has left out is charged when somebody looks again, and nothing is charged twice.
"""

from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core.errors import BadInputError
from conpaas.director import costs
from conpaas.director.db.models import CreditEntry, Instance, Service, User
from conpaas.director.events import record

HOUR = timedelta(hours=1)
WARN_HOURS = 3
"""Credits run low when they pay for fewer hours than this of what runs."""
BATCH = 200


def charge_first(session: AsyncSession, user: User, instance: Instance) -> None:
    """Charge the first hour of an instance that is about to be made."""
    _charge(session, user, instance, instance.created)


def charge_until(session: AsyncSession, user: User, instance: Instance, now: datetime) -> None:
    """Charge every hour of the instance that has begun before `now`."""
    while instance.next_charge is not None and instance.next_charge < now:
        _charge(session, user, instance, now)


def end(session: AsyncSession, user: User, service: Service, instance: Instance, now: datetime) -> None:
    """Charge what is begun; from `now` on the instance costs nothing. Fine if it has ended already."""
    if instance.ended is None:
        charge_until(session, user, instance, now)
        instance.ended, instance.next_charge = now, None
        service.spent = costs.add(service.spent, costs.of(instance, now))


def refund(session: AsyncSession, user: User, instance: Instance, now: datetime, reason: str) -> None:
    """Give back all that was charged for an instance that never was. Fine if that was done."""
    for hour in range(instance.charged):
        session.add(
            CreditEntry(
                user_id=user.id, kind="refund", delta=1, instance_id=instance.id, hour=hour, at=now, reason=reason[:200]
            )
        )
    user.credits += instance.charged
    instance.charged = 0
    instance.ended, instance.next_charge = instance.ended or now, None


def grant(session: AsyncSession, user: User, amount: int, *, at: datetime, actor: str, reason: str) -> None:
    """Give credits to a user, or take them (negative)."""
    if amount == 0:
        raise BadInputError("an amount of 0 changes nothing", value=0)
    before = user.credits
    session.add(CreditEntry(user_id=user.id, kind="grant", delta=amount, at=at, reason=reason[:200]))
    user.credits += amount
    record(
        session,
        "credits-granted",
        at=at,
        actor=actor,
        user=user.id,
        message=reason or f"{amount:+d} credits",
        before=str(before),
        after=str(user.credits),
    )


async def charge_due(session: AsyncSession, now: datetime) -> bool:
    """Charge one batch of hours that have begun; return whether there may be more."""
    query = (
        select(Instance, User)
        .join(User, User.id == Instance.user_id)
        .where(Instance.next_charge < now)
        .order_by(Instance.seq)
        .limit(BATCH)
    )
    rows = (await session.execute(query)).all()
    for instance, user in rows:
        charge_until(session, user, instance, now)
    return len(rows) == BATCH


async def warn(session: AsyncSession, now: datetime) -> None:
    """Write an event for each user whose credits have come to run low; once, until they are enough again."""
    running = func.count(Instance.seq)
    query = (
        select(User, running)
        .join(Instance, Instance.user_id == User.id)
        .where(Instance.ended.is_(None))
        .group_by(*User.__table__.columns)
        .having((User.credits < WARN_HOURS * running) != User.warned)
    )
    for user, count in (await session.execute(query)).all():
        user.warned = not user.warned
        if user.warned:
            record(
                session,
                "credits-low",
                at=now,
                actor="director",
                user=user.id,
                message=f"{user.credits} credits are left for {count} instances: fewer than {WARN_HOURS} hours",
            )


def _charge(session: AsyncSession, user: User, instance: Instance, at: datetime) -> None:
    hour = instance.charged
    session.add(CreditEntry(user_id=user.id, kind="charge", delta=-1, instance_id=instance.id, hour=hour, at=at))
    user.credits -= 1
    instance.charged = hour + 1
    instance.next_charge = instance.created + (hour + 1) * HOUR
