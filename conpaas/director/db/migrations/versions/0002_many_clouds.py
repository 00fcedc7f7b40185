"""Many clouds: accounts in the database, volumes, prices; the spec says where a service is."""

import sqlalchemy as sa
from alembic import op

from conpaas.director.db import models

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Go forward."""
    op.create_table(
        "cloud_accounts",
        sa.Column("name", sa.String(length=60), nullable=False),
        sa.Column("driver", sa.String(length=60), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("created", models.UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_cloud_accounts")),
    )
    _place_instances()
    _place_services()
    op.create_table(
        "volumes",
        sa.Column("seq", _NUMBER, nullable=False),
        sa.Column("id", sa.String(length=60), nullable=False),
        sa.Column("service_id", sa.String(length=60), nullable=False),
        sa.Column("role", sa.String(length=60), nullable=False),
        sa.Column("cloud", sa.String(length=60), nullable=False),
        sa.Column("cloud_id", sa.String(length=200), nullable=False),
        sa.Column("zone", sa.String(length=60), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("used", sa.Boolean(), nullable=False),
        sa.Column("instance_id", sa.String(length=60), nullable=True),
        sa.Column("created", models.UtcDateTime(timezone=True), nullable=False),
        sa.Column("deleted", models.UtcDateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["instance_id"], ["instances.id"], name=op.f("fk_volumes_instance_id")),
        sa.ForeignKeyConstraint(["service_id"], ["services.id"], name=op.f("fk_volumes_service_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_volumes")),
        sa.UniqueConstraint("id", name=op.f("uq_volumes_id")),
    )
    with op.batch_alter_table("volumes", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_volumes_service_id"), ["service_id"], unique=False)


def _place_instances() -> None:
    """Instances are where they were asked for."""
    with op.batch_alter_table("instances", schema=None) as batch_op:
        batch_op.add_column(sa.Column("meant_for", sa.String(length=60), nullable=True))
        batch_op.add_column(sa.Column("size", sa.String(length=60), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("zone", sa.String(length=60), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("price", sa.String(length=40), nullable=True))
        batch_op.add_column(sa.Column("currency", sa.String(length=3), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("stage", sa.Text(), nullable=False, server_default=""))
    op.execute("UPDATE instances SET meant_for = cloud")
    with op.batch_alter_table("instances", schema=None) as batch_op:
        batch_op.alter_column("meant_for", nullable=False, existing_type=sa.String(length=60))
        for name in ("size", "zone", "currency"):
            batch_op.alter_column(name, server_default=None, existing_type=sa.String(length=60))
        batch_op.alter_column("stage", server_default=None, existing_type=sa.Text())


def _place_services() -> None:
    """What is wanted of a service says where it is to be."""
    services = sa.table("services", sa.column("id"), sa.column("cloud"), sa.column("wanted", sa.JSON()))
    connection = op.get_bind()
    for row in connection.execute(sa.select(services)).all():
        wanted = {**row.wanted, "cloud": row.cloud}
        connection.execute(services.update().where(services.c.id == row.id).values(wanted=wanted))
    with op.batch_alter_table("services", schema=None) as batch_op:
        batch_op.add_column(sa.Column("spent", sa.JSON(), nullable=False, server_default="{}"))
        batch_op.drop_column("cloud")
    with op.batch_alter_table("services", schema=None) as batch_op:
        batch_op.alter_column("spent", server_default=None, existing_type=sa.JSON())
