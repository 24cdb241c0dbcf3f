"""Run by alembic for every command: the steps, on the connection and within the transaction that `upgrade` was given."""

from __future__ import annotations

from alembic import context

from adapters_store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
