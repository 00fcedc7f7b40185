"""Cloud accounts that administrators add, try, change and remove; their settings are encrypted at rest."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select

from conpaas.core.clock import Clock
from conpaas.core.cloud import CanExamine, Finding, HasImages, HasQuota, HasZones, Size
from conpaas.core.errors import BadInputError, ConflictError, ConpaasError
from conpaas.core.messages import public
from conpaas.director import views
from conpaas.director.clouds import Account, Clouds, Plan
from conpaas.director.db.database import Database
from conpaas.director.db.models import CloudAccount, Instance, VolumeRow
from conpaas.director.events import record
from conpaas.director.vault import Vault

HIDDEN = "**********"
"""What a secret setting shows; sent back, it leaves the secret as it is."""


class CloudAccounts:
    """What is kept of cloud accounts, and what administrators do with them."""

    def __init__(self, db: Database, clouds: Clouds, vault: Vault, clock: Clock) -> None:
        self._db, self._clouds, self._vault, self._clock = db, clouds, vault, clock

    async def plans(self) -> list[Plan]:
        """Return the accounts that the database has."""
        async with self._db.read() as session:
            return [self._plan(row) for row in await session.scalars(select(CloudAccount).order_by(CloudAccount.name))]

    def _plan(self, row: CloudAccount) -> Plan:
        settings = json.loads(self._vault.unseal(row.settings))
        return Plan(row.name, row.driver, settings, public.CloudOptions.model_validate(row.options))

    def types(self) -> public.CloudTypes:
        """Show the kinds of clouds."""
        return public.CloudTypes(
            items=tuple(
                public.CloudTypeView(
                    name=kind.name,
                    title=kind.title,
                    description=kind.description,
                    settings=kind.settings.model_json_schema(),
                )
                for _, kind in sorted(self._clouds.kinds.items())
            )
        )

    async def accounts(self) -> public.CloudAccounts:
        """Show all accounts."""
        query = select(Instance.cloud, func.count()).where(views.held()).group_by(Instance.cloud)
        async with self._db.read() as session:
            counts = dict((await session.execute(query)).all())
        return public.CloudAccounts(
            items=tuple(self._view(account, counts.get(name, 0)) for name, account in self._clouds.accounts.items())
        )

    def _view(self, account: Account, instances: int) -> public.CloudAccountView:
        plan = account.plan
        return public.CloudAccountView(
            name=plan.name,
            driver=plan.driver,
            settings=self._shown(plan),
            options=plan.options,
            fixed=plan.fixed,
            default=plan.name == self._clouds.default,
            usable=account.cloud is not None,
            reason=account.reason,
            trouble=account.trouble,
            instances=instances,
            sizes=size_views(account),
        )

    def _shown(self, plan: Plan) -> dict[str, Any]:
        """Return the settings of an account, its secrets as asterisks; all of them if they cannot be read."""
        try:
            shown: dict[str, Any] = self._clouds.checked(plan).model_dump(mode="json", exclude_unset=True)
        except ConpaasError:
            return dict.fromkeys(plan.settings, HIDDEN)
        return shown

    async def add(self, form: public.CloudForm, actor: str) -> public.CloudAccountView:
        """Add an account; raise ConflictError if there is one of that name, BadInputError for settings that are off."""
        if form.name in self._clouds.accounts:
            raise ConflictError(f"there is a cloud '{form.name}'", value=form.name, hint="choose another name")
        plan = self._checked(form, {})
        await self._keep(plan, "cloud-added", actor)
        return self._view(await self._take(plan), 0)

    async def change(self, name: str, form: public.CloudForm, actor: str) -> public.CloudAccountView:
        """Change an account: all of it, but for secrets that are left out."""
        account = self._own(name)
        if form.name != name:
            raise BadInputError("a cloud cannot be renamed", value=form.name, hint="instances know it by its name")
        held = await self._instances(name)
        if form.driver != account.plan.driver and held:
            raise ConflictError(
                f"'{name}' is in use (instances: {held}): its driver stays", value=form.driver, hint="add another"
            )
        plan = self._checked(form, account.plan.settings)
        await self._keep(plan, "cloud-changed", actor)
        return self._view(await self._take(plan), held)

    async def remove(self, name: str, actor: str) -> None:
        """Remove an account; raise ConflictError while instances or volumes are there."""
        self._own(name)
        if name == self._clouds.default:
            raise ConflictError("this is the default cloud", value=name, hint="set 'default_cloud' to another one")
        async with self._db.write() as session:
            held = await session.scalar(
                select(func.count()).select_from(Instance).where(Instance.cloud == name, views.held())
            )
            volumes = select(func.count()).select_from(VolumeRow)
            kept = await session.scalar(volumes.where(VolumeRow.cloud == name, VolumeRow.deleted.is_(None)))
            if held or kept:
                raise ConflictError(
                    f"'{name}' is in use (instances: {held}, volumes: {kept})",
                    value=name,
                    hint="move or terminate their services first; disable the cloud meanwhile",
                )
            row = await session.get(CloudAccount, name)
            if row is not None:
                await session.delete(row)
            record(session, "cloud-removed", at=self._clock.now(), actor=actor, message=name)
        await self._clouds.drop(name)

    def _own(self, name: str) -> Account:
        account = self._clouds.account(name)
        if account.plan.fixed:
            raise ConflictError(
                f"cloud '{name}' is part of the director's own settings", value=name, hint="change it there"
            )
        return account

    def _checked(self, form: public.CloudForm, before: Mapping[str, Any]) -> Plan:
        plan = Plan(form.name, form.driver, _restored(form.settings, before), form.options)
        plan = Plan(form.name, form.driver, {**self._secrets(plan, before), **plan.settings}, form.options)
        self._clouds.checked(plan)
        return plan

    def _secrets(self, plan: Plan, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return the secret settings of `before`: they stay unless others are given."""
        kind = self._clouds.kinds.get(plan.driver)
        schema = {} if kind is None else kind.settings.model_json_schema().get("properties", {})
        return {name: value for name, value in before.items() if "writeOnly" in json.dumps(schema.get(name, {}))}

    async def _keep(self, plan: Plan, what: str, actor: str) -> None:
        now = self._clock.now()
        sealed = self._vault.seal(json.dumps(dict(plan.settings)))
        options = plan.options.model_dump(mode="json")
        async with self._db.write() as session:
            row = await session.get(CloudAccount, plan.name)
            if row is None:
                row = CloudAccount(name=plan.name, driver=plan.driver, settings=sealed, options=options, created=now)
                session.add(row)
            row.driver, row.settings, row.options = plan.driver, sealed, options
            record(session, what, at=now, actor=actor, message=f"{plan.name}: {plan.driver}")

    async def _take(self, plan: Plan) -> Account:
        account = await self._clouds.put(plan)
        await self._clouds.learn_sizes_of(account)
        return account

    async def _instances(self, name: str) -> int:
        query = select(func.count()).select_from(Instance).where(Instance.cloud == name, views.held())
        async with self._db.read() as session:
            return await session.scalar(query) or 0

    # -- trying -----------------------------------------------------------------------------------------------------

    async def examine(self, name: str) -> public.Examination:
        """Try an account."""
        return await _examine(self._clouds.account(name))

    async def try_out(self, form: public.CloudForm) -> public.Examination:
        """Try an account that is not kept, or not yet so; secrets that are left out are those that are kept."""
        before = self._clouds.accounts.get(form.name)
        plan = self._checked(form, {} if before is None or before.plan.fixed else before.plan.settings)
        async with self._clouds.on_trial(plan) as account:
            return await _examine(account)


def _restored(shown: Any, before: Any) -> Any:
    """Return settings with the secrets of `before` in the place of asterisks; BadInputError where there is none."""
    if shown == HIDDEN:
        if before is None:
            raise BadInputError("a secret is given as asterisks, and none is kept here", hint="write the secret again")
        return before
    if isinstance(shown, Mapping):
        by_key = before if isinstance(before, Mapping) else {}
        return {key: _restored(value, by_key.get(key)) for key, value in shown.items()}
    if isinstance(shown, list):
        items = before if isinstance(before, list) else []
        return [_restored(item, _same(item, items, number, len(shown))) for number, item in enumerate(shown)]
    return shown


def _same(item: Any, before: Sequence[Any], number: int, count: int) -> Any:
    """Return what an item of a list was before: the one that looks the same, else the one in its place."""
    if isinstance(item, Mapping):
        for one in before:
            if isinstance(one, Mapping) and all(
                one.get(key) == value for key, value in item.items() if value != HIDDEN
            ):
                return one
    return before[number] if len(before) == count else None


def size_views(account: Account) -> tuple[public.SizeView, ...]:
    """Show the sizes of a cloud, with our own prices where there are any."""
    return tuple(_size(account, size) for size in account.sizes)


def _size(account: Account, size: Size) -> public.SizeView:
    price, currency = account.price(size.name)
    return public.SizeView(
        name=size.name,
        cores=size.cores,
        memory=size.memory,
        disk=size.disk,
        price=price,
        currency=currency or size.currency,
        default=size.default,
    )


async def _examine(account: Account) -> public.Examination:
    """Look at all that an account can tell; what it cannot tell is a finding."""
    cloud = account.cloud
    if cloud is None:
        return public.Examination(findings=(public.FindingView(name="the settings", ok=False, detail=account.reason),))
    findings: list[Finding] = []
    if isinstance(cloud, CanExamine):
        findings += await account.ask("look", cloud.examine)
    else:
        findings.append(await _listing(account))
    if not all(finding.ok for finding in findings):
        return public.Examination(findings=_shown(findings))
    images = await account.ask("look", cloud.images) if isinstance(cloud, HasImages) else ()
    rooms = await account.ask("look", cloud.quota) if isinstance(cloud, HasQuota) else ()
    zones = await account.ask("look", cloud.zones) if isinstance(cloud, HasZones) else ()
    return public.Examination(
        findings=_shown(findings),
        quota=tuple(public.RoomView(name=room.name, used=room.used, limit=room.limit) for room in rooms),
        images=tuple(image.id for image in images),
        zones=tuple(zones),
    )


async def _listing(account: Account) -> Finding:
    """Try the one call that every driver has and that makes nothing."""
    cloud = account.cloud
    if cloud is None:
        return Finding(name="the settings", ok=False, detail=account.reason)
    try:
        vms = await account.ask("list", cloud.list)
    except ConpaasError as exc:
        return Finding(name="listing instances", ok=False, detail=exc.message, hint=exc.hint)
    return Finding(name="listing instances", ok=True, detail=f"{len(vms)} are ours")


def _shown(findings: Sequence[Finding]) -> tuple[public.FindingView, ...]:
    return tuple(
        public.FindingView(name=finding.name, ok=finding.ok, detail=finding.detail, hint=finding.hint)
        for finding in findings
    )
