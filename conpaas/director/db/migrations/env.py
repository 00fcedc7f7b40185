"""Alembic's entry: runs the migrations on the connection it is given by `database.migrate`."""

from alembic import context
from sqlalchemy import Connection

from conpaas.director.db.models import Base

connection: Connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    transaction_per_migration=False,
    user_module_prefix="models.",
)
with context.begin_transaction():
    context.run_migrations()
