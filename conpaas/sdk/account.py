"""Accounts, tokens, keys, and what administrators do."""

from collections.abc import Sequence
from typing import Literal

from pydantic import SecretStr

from conpaas.core.messages import public
from conpaas.core.messages.public import (
    Captcha,
    CertificateRequest,
    ChangePassword,
    ChangeUser,
    CreateToken,
    Grant,
    InstanceRow,
    KeyView,
    Paging,
    Registration,
    TokenView,
    UserCertificate,
    UserView,
    Version,
)
from conpaas.sdk.caller import Caller


class AccountCalls(Caller):
    """What concerns the caller's own account."""

    async def version(self) -> Version:
        """Return what answers here; needs no token."""
        answer: Version = await self._call(public.GET_VERSION)
        return answer

    async def captcha(self) -> Captcha:
        """Return a proof-of-work challenge: `solve(captcha.challenge)` gives what `register` needs."""
        answer: Captcha = await self._call(public.GET_CAPTCHA)
        return answer

    async def register(self, registration: Registration) -> UserView:
        """Make an account; raise ConflictError if the user name is taken."""
        answer: UserView = await self._call(public.REGISTER, registration)
        return answer

    async def logout(self) -> None:
        """End the session of this client's token."""
        await self._call(public.LOGOUT)

    async def me(self) -> UserView:
        """Return the caller's account, credits included."""
        answer: UserView = await self._call(public.GET_ME)
        return answer

    async def change_password(self, old: str, new: str) -> None:
        """Change the password; raise NotAuthenticatedError or ForbiddenError if `old` is wrong."""
        await self._call(public.CHANGE_PASSWORD, ChangePassword(old=SecretStr(old), new=SecretStr(new)))

    async def tokens(self) -> tuple[TokenView, ...]:
        """Return the caller's API tokens, without their secrets."""
        answer: public.Tokens = await self._call(public.LIST_TOKENS)
        return answer.items

    async def create_token(
        self,
        name: str,
        *,
        scopes: Sequence[Literal["read", "write", "admin"]] = ("read", "write"),
        expires_in_days: int = 90,
    ) -> TokenView:
        """Make an API token; its `secret` is in this answer and never again."""
        body = CreateToken(name=name, scopes=tuple(scopes), expires_in_days=expires_in_days)
        answer: TokenView = await self._call(public.CREATE_TOKEN, body)
        return answer

    async def delete_token(self, token: str) -> None:
        """Revoke the API token with this id."""
        await self._call(public.DELETE_TOKEN, token=token)

    async def keys(self) -> tuple[KeyView, ...]:
        """Return the caller's SSH keys."""
        answer: public.Keys = await self._call(public.LIST_KEYS)
        return answer.items

    async def add_key(self, name: str, key: str) -> KeyView:
        """Add an SSH public key, one `authorized_keys` line, for `git push`."""
        answer: KeyView = await self._call(public.ADD_KEY, public.AddKey(name=name, key=key))
        return answer

    async def delete_key(self, key: str) -> None:
        """Remove the SSH key with this id."""
        await self._call(public.DELETE_KEY, key=key)

    async def certificate(self, csr: str) -> UserCertificate:
        """Return a certificate, for a PEM signing request, with which the caller may talk to managers."""
        answer: UserCertificate = await self._call(public.GET_CERTIFICATE, CertificateRequest(csr=csr))
        return answer


class AdminCalls(Caller):
    """What only an administrator may do."""

    async def users(self) -> list[UserView]:
        """Return all accounts."""
        return [user async for user in self._pages(public.LIST_USERS, Paging())]

    async def change_user(self, user: str, *, admin: bool | None = None, disabled: bool | None = None) -> UserView:
        """Make the user with this id an administrator or not, disabled or not; None leaves it."""
        given = {"admin": admin, "disabled": disabled}
        body = ChangeUser.model_validate({name: value for name, value in given.items() if value is not None})
        answer: UserView = await self._call(public.CHANGE_USER, body, user=user)
        return answer

    async def grant(self, user: str, amount: int, *, reason: str = "") -> UserView:
        """Give credits to the user with this id, or take some (a negative amount)."""
        answer: UserView = await self._call(public.GRANT, Grant(amount=amount, reason=reason), user=user)
        return answer

    async def instances(self) -> list[InstanceRow]:
        """Return all instances of all users."""
        return [row async for row in self._pages(public.LIST_INSTANCES, Paging())]
