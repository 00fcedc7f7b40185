"""The settings of the director: a TOML file, then the environment (`CONPAAS_…`), then the command line."""

import difflib
import os
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from conpaas.core.errors import BadInputError
from conpaas.core.messages.base import Message
from conpaas.core.rpc import bad_input
from conpaas.core.timings import Timings

Port = int


def default_data_dir() -> Path:
    """Return where the director keeps its data: a system folder for root, the user's own otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/conpaas")
    share = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(share) / "conpaas"


class Limits(Message):
    """What one user may use of the director."""

    upload_bytes: PositiveInt = 512 * 1024 * 1024
    """Largest archive of a code version, in bytes."""
    code_versions: PositiveInt = 100
    """Most code versions per service."""
    services: PositiveInt = 50
    """Most services per user that are not terminated."""
    applications: PositiveInt = 50
    """Most applications per user."""
    tokens: PositiveInt = 50
    """Most API tokens, and most SSH keys, per user."""


class DirectorSettings(BaseSettings):
    """All settings of the director. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_prefix="CONPAAS_",
        env_nested_delimiter="__",
        extra="ignore",
        use_attribute_docstrings=True,
    )

    data_dir: Path = Field(default_factory=default_data_dir)
    """Folder of the database, the CA, the uploaded code and the local cloud's instances."""
    host: str = "127.0.0.1"
    """Address on which the API and the web UI listen."""
    port: Port = Field(default=9999, ge=0, le=65535)
    """Port of the API and the web UI; 0 takes any free one."""
    instances_host: str = "127.0.0.1"
    """Address on which managers and agents are served, over mutual TLS."""
    instances_port: Port = Field(default=9443, ge=0, le=65535)
    """Port for managers and agents; 0 takes any free one."""
    instances_url: str = ""
    """Where instances find the director, if not at `https://INSTANCES_HOST:INSTANCES_PORT`."""
    git_push: bool = True
    """Whether code can be pushed with git, over SSH."""
    ssh_port: Port = Field(default=9922, ge=0, le=65535)
    """Port for `git push` over SSH; 0 takes any free one."""
    database: str = ""
    """URL of the database; empty: SQLite in the data folder. PostgreSQL: `postgresql+asyncpg://user@host/name`."""
    deployment: str = ""
    """Name of this deployment, the tag of its instances; empty: made once and kept with the CA."""
    clouds: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"local": {"driver": "local"}})
    """Cloud accounts by name; `driver` names the kind, then come the options of every account (`title`, `prices`, …),
    the rest is the driver's. More are added with `conpaas cloud add`."""
    default_cloud: str = "local"
    """The cloud of a service whose owner chose none."""
    registration: bool = True
    """Whether people can make accounts themselves."""
    registration_credits: int = Field(default=50, ge=0)
    """Credits of a new account."""
    admin_credits: int = Field(default=9999, ge=0)
    """Credits of the administrator's account that the first start makes."""
    admin_password: SecretStr = SecretStr("")
    """Password of that account; empty: a random one, printed once."""
    captcha_work: PositiveInt = 1000
    """Keys that the browser of somebody who registers must derive, each with 1000 rounds of PBKDF2: seconds of work."""
    limits: Limits = Limits()
    """What one user may use."""
    session_s: PositiveFloat = 7 * 86400.0
    """How long a login lasts."""
    login_failures: PositiveInt = 10
    """Failed logins per user name, and ten times as many per address, within `login_window_s`."""
    login_window_s: PositiveFloat = 300.0
    """The window in which failed logins are counted."""
    certificate_s: PositiveFloat = 86400.0
    """How long a certificate of a manager, an agent or a user is valid; instances renew at two thirds."""
    enrol_token_s: PositiveFloat = 900.0
    """How long a new instance may use its one-use enrolment token."""
    operation_deadline_s: PositiveFloat = 900.0
    """How long an operation may take before it counts as failed; the service keeps trying all the same."""
    stop_deadline_s: PositiveFloat = 180.0
    """How long a manager may take to stop its service before the director deletes the instances itself."""
    manager_silent_s: PositiveFloat = 20.0
    """How long a manager may be silent before it is replaced."""
    manager_retry_s: PositiveFloat = 30.0
    """Pause between two attempts to replace a manager."""
    cloud_calls: PositiveInt = 16
    """Calls to one cloud at the same time."""
    cloud_deadline_s: PositiveFloat = 30.0
    """How long one call to a cloud's provider may take."""
    cloud_lag_s: float = Field(default=20.0, ge=0)
    """How long an instance may be missing from its cloud's lists after it was made."""
    cloud_retry_s: tuple[PositiveFloat, ...] = (1.0, 3.0, 10.0)
    """Pauses between attempts when a cloud is busy."""
    reconcile_period_s: PositiveFloat = 10.0
    """How often the ledger is compared with the clouds."""
    watch_period_s: PositiveFloat = 2.0
    """How often managers, deadlines and half-done stops are looked at."""
    charge_period_s: PositiveFloat = 15.0
    """How often begun hours are charged."""
    retention_s: PositiveFloat = 86400.0
    """How long metrics are kept."""
    git_allow_file: bool = False
    """Whether code may be checked out of repositories on the director's own disk: for tests."""
    git_allow_private: bool = False
    """Whether code may be checked out from private and loopback addresses."""
    timings: Timings = Timings()
    """Deadlines and periods of managers and agents."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the command line win over the environment, and that over the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def load(cls, file: Path | None = None, **given: Any) -> Self:
        """Read the settings. `file` (default: `director.toml` in the data folder, if there) and `given` on top.

        Raises BadInputError for a missing or damaged file, and for a value that is off.
        """
        try:
            path = file or cls(**given).data_dir / "director.toml"
            if file is not None and not file.is_file():
                raise BadInputError(f"there is no settings file {file}", value=str(file))
            if path.is_file():
                _check_names(path, cls.model_fields)
            from_file = type(cls.__name__, (cls,), {"model_config": {"toml_file": path}, "__doc__": cls.__doc__})
            return from_file(**given)  # type: ignore[no-any-return]  # made by type()
        except tomllib.TOMLDecodeError as exc:
            raise BadInputError(f"{file}: {exc}", value=str(file), hint="it must be TOML") from exc
        except ValidationError as exc:
            raise bad_input(exc) from exc

    @property
    def database_url(self) -> str:
        """The URL of the database."""
        return self.database or f"sqlite+aiosqlite:///{self.data_dir / 'director.sqlite'}"


def _check_names(file: Path, known: Collection[str]) -> None:
    """Raise BadInputError for a setting in `file` that there is not: a typing error would else have no effect."""
    for name in tomllib.loads(file.read_text(encoding="utf-8")):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "docs/reference/settings.md lists them all"
            raise BadInputError(f"{file}: there is no setting '{name}'", value=name, hint=hint)
