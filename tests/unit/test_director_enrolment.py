"""Only an instance that is wanted gets a certificate, once for its token; a manager that was replaced gets none."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from conpaas.core import tls
from conpaas.core.errors import BadInputError, ForbiddenError, NotAuthenticatedError
from conpaas.core.identity import Identity
from conpaas.core.states import NodeState
from conpaas.core.trust import Caller, caller_of
from conpaas.director.vault import Vault
from tests.fakes.director import DATABASES, START, Rig, open_rig


@pytest.fixture(params=DATABASES)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, request.param) as rig:
        yield rig


@pytest.fixture
async def service(rig: Rig) -> str:
    return (await rig.create(await rig.add_user())).id


def csr() -> str:
    return tls.make_key_and_csr()[1].decode()


def identity(pem: str) -> Identity:
    certificate = x509.load_pem_x509_certificate(pem.encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return Identity.parse(names.get_values_for_type(x509.UniformResourceIdentifier)[0])


async def test_a_token_gives_its_instance_a_certificate_of_its_own(rig: Rig, service: str) -> None:
    manager = await rig.manager(service)

    pem = await rig.enrol(manager.id)

    deployment = rig.director.trust.deployment
    assert identity(pem) == Identity.manager(deployment, service, 1, manager.id)
    _, until = tls.certificate_lifetime(pem.encode())
    assert until == START + timedelta(hours=24)
    row = await rig.instance(manager.id)
    assert (row.state, row.booted) == (NodeState.CONFIGURING, START)


async def test_a_token_works_again_for_the_same_key_only(rig: Rig, service: str) -> None:
    manager = await rig.manager(service)
    first = csr()
    await rig.enrol(manager.id, first)

    await rig.enrol(manager.id, first)  # the answer was lost
    with pytest.raises(ForbiddenError, match="has been used"):
        await rig.enrol(manager.id, csr())


async def test_a_token_expires(rig: Rig, service: str) -> None:
    manager = await rig.manager(service)
    rig.clock.advance(seconds=901)

    with pytest.raises(NotAuthenticatedError, match="too old"):
        await rig.enrol(manager.id)


@pytest.mark.parametrize("token", ["", ".", "vm-x.00", "vm-unknown", "é.é"])
async def test_a_forged_token_is_refused(rig: Rig, token: str) -> None:
    with pytest.raises(NotAuthenticatedError, match="not valid"):
        await rig.enrolment.enrol(token, csr())


async def test_a_derived_token_of_no_instance_is_refused(rig: Rig) -> None:
    with pytest.raises(NotAuthenticatedError, match="not valid"):
        await rig.enrol("vm-unknown")


async def test_a_request_that_is_none_uses_no_token_up(rig: Rig, service: str) -> None:
    manager = await rig.manager(service)

    with pytest.raises(BadInputError):
        await rig.enrol(manager.id, "rubbish")

    await rig.enrol(manager.id)


async def test_an_instance_that_is_given_up_gets_no_certificate(rig: Rig, service: str) -> None:
    manager = await rig.manager(service)
    pem = await rig.enrol(manager.id)
    await rig.ledger.delete(manager.id, "enough")

    with pytest.raises(ForbiddenError, match="no longer wanted"):
        await rig.enrol(manager.id)
    with pytest.raises(ForbiddenError, match="no longer wanted"):
        await rig.enrolment.renew(caller_of(identity(pem)), csr())


async def test_a_manager_that_was_replaced_cannot_renew(rig: Rig, service: str) -> None:
    old = caller_of(identity(await rig.enrol((await rig.manager(service)).id)))
    await rig.reconciler.replace_manager(service, 1, "test")

    with pytest.raises(ForbiddenError):
        await rig.enrolment.renew(old, csr())
    new = caller_of(identity(await rig.enrol((await rig.manager(service)).id)))
    assert (await rig.service(service)).epoch == new.epoch == 2
    renewed = await rig.enrolment.renew(new, csr())
    assert identity(renewed.certificate).epoch == 2
    assert renewed.renew_in_s == pytest.approx(16 * 3600)


async def test_a_certificate_renews_its_own_identity_only(rig: Rig, service: str) -> None:
    manager = await rig.manager(service)
    await rig.enrol(manager.id)

    with pytest.raises(ForbiddenError, match="not of this instance"):
        await rig.enrolment.renew(Caller("agent", service=service, instance=manager.id), csr())
    with pytest.raises(ForbiddenError, match="only instances"):
        await rig.enrolment.renew(Caller("user", user="usr-a"), csr())
    with pytest.raises(ForbiddenError, match="no instance"):
        await rig.enrolment.renew(Caller("agent", service=service, instance="vm-none"), csr())


async def test_the_directors_own_certificate_is_renewed_in_time(rig: Rig) -> None:
    path = rig.settings.data_dir / "ca" / "director.crt"
    before = path.read_bytes()

    rig.clock.advance(hours=15)
    rig.director.trust.renew_own()
    assert path.read_bytes() == before

    rig.clock.advance(hours=2)
    rig.director.trust.renew_own()
    assert path.read_bytes() != before


async def test_the_ca_and_the_deployments_name_stay(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        deployment, ca = rig.director.trust.deployment, rig.director.trust.ca
        service = (await rig.create(await rig.add_user())).id
        token = rig.enrolment.token((await rig.manager(service)).id)

    async with open_rig(tmp_path) as rig:
        assert (rig.director.trust.deployment, rig.director.trust.ca) == (deployment, ca)
        assert (await rig.enrolment.enrol(token, csr())).certificate  # known after a restart

    with pytest.raises(BadInputError, match="belongs to deployment"):
        async with open_rig(tmp_path, deployment="dep-other"):
            pass


async def test_secrets_are_sealed_with_the_key_of_the_data_folder(tmp_path: Path) -> None:
    vault = Vault.load(tmp_path)
    sealed = vault.seal("grape")

    assert "grape" not in sealed
    assert Vault.load(tmp_path).unseal(sealed) == "grape"
    assert (tmp_path / "vault.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").mkdir()
    with pytest.raises(BadInputError, match="does not fit"):
        Vault.load(tmp_path / "other").unseal(sealed)
    (tmp_path / "vault.key").write_text("rubbish")
    with pytest.raises(BadInputError, match="damaged"):
        Vault.load(tmp_path)
