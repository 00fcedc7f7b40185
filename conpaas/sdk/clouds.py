"""Cloud accounts: what administrators add, try, change and remove."""

from conpaas.core.errors import NotFoundError
from conpaas.core.messages import public
from conpaas.core.messages.public import CloudAccountView, CloudForm, CloudTypeView, Examination
from conpaas.sdk.caller import Caller


class CloudCalls(Caller):
    """The cloud accounts of a director; for administrators."""

    async def cloud_types(self) -> tuple[CloudTypeView, ...]:
        """Return the kinds of clouds; the `settings` of each are a JSON Schema, secret where it says `writeOnly`."""
        answer: public.CloudTypes = await self._call(public.LIST_CLOUD_TYPES)
        return answer.items

    async def cloud_accounts(self) -> tuple[CloudAccountView, ...]:
        """Return all cloud accounts, their secrets as asterisks."""
        answer: public.CloudAccounts = await self._call(public.LIST_CLOUD_ACCOUNTS)
        return answer.items

    async def cloud_account(self, name: str) -> CloudAccountView:
        """Return the cloud account of this name; raise NotFoundError if there is none."""
        accounts = await self.cloud_accounts()
        for account in accounts:
            if account.name == name:
                return account
        known = ", ".join(account.name for account in accounts) or "none"
        raise NotFoundError(f"there is no cloud '{name}'", value=name, hint=f"there are: {known}")

    async def add_cloud(self, form: CloudForm) -> CloudAccountView:
        """Add a cloud account; it is not tried, see `try_cloud`.

            form = CloudForm(name="spare", driver="local", settings={"block": "127.50.0.0/16"})
            if all(finding.ok for finding in (await conpaas.try_cloud(form)).findings):
                await conpaas.add_cloud(form)

        Raises ConflictError if there is one of that name, BadInputError for settings that its kind does not take.
        """
        answer: CloudAccountView = await self._call(public.ADD_CLOUD, form)
        return answer

    async def change_cloud(self, form: CloudForm) -> CloudAccountView:
        """Replace the settings and options of the cloud account `form.name`.

        Secrets that are left out, or are as `cloud_account` shows them, stay. Raises ConflictError for one that is
        part of the director's own settings.
        """
        answer: CloudAccountView = await self._call(public.CHANGE_CLOUD, form, cloud=form.name)
        return answer

    async def remove_cloud(self, name: str) -> None:
        """Remove a cloud account; raise ConflictError while instances or volumes are there."""
        await self._call(public.REMOVE_CLOUD, cloud=name)

    async def examine_cloud(self, name: str) -> Examination:
        """Try a cloud account without making anything there: it is fine if every finding is."""
        answer: Examination = await self._call(public.EXAMINE_CLOUD, cloud=name)
        return answer

    async def try_cloud(self, form: CloudForm) -> Examination:
        """Try a cloud account as it would be, before it is added or changed."""
        answer: Examination = await self._call(public.TRY_CLOUD, form)
        return answer
