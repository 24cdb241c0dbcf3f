"""Who may use a store: its tenants and their API keys, as `Store` offers them. Checks names; the queries are elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .catalog import Catalog
from .digest import Digest
from .keys import NewKey
from .names import check_name, check_owner
from .records import JSON, KeyRecord, TenantRecord


class Access:
    """The half of `Store` that is about tenants and keys.

    A tenant need not be known here to own adapters: a store without keys serves one tenant that nobody ever registered.
    """

    _catalog: Catalog

    def tenant(self, name: str) -> TenantRecord:
        """Raises: NotFound."""
        return self._catalog.tenants.get(check_name("tenant", name))

    def put_tenant(self, name: str, policy: Mapping[str, JSON]) -> TenantRecord:
        """A new tenant, or another policy for one that there is. Raises: Invalid for a name that nobody can have."""
        return self._catalog.tenants.put(check_owner(name), policy)

    def list_tenants(self) -> tuple[TenantRecord, ...]:
        """In the order of their names."""
        return self._catalog.tenants.list()

    def delete_tenant(self, name: str, *, adapters: bool = False) -> frozenset[Digest]:
        """Forgets a tenant: its keys stop working, its users are unbound, its adapters are deleted. The adapters' digests.

        Raises: NotFound; Conflict when it has adapters and `adapters` does not say that they may go.
        """
        return self._catalog.tenants.delete(check_name("tenant", name), adapters=adapters)

    def add_key(self, tenant: str, scopes: Sequence[str], note: str = "") -> NewKey:
        """A new key of `tenant`, which is made if need be; any number of its keys work side by side.

        Its text is kept nowhere: what is returned is the only copy.

        Raises: Invalid for a name that nobody can have, for scopes or a note that cannot be kept.
        """
        return self._catalog.keys.add(check_owner(tenant), scopes, note)

    def find_key(self, text: str) -> tuple[KeyRecord, TenantRecord] | None:
        """What a key stands for; None for one that is unknown or revoked, or whose tenant is gone."""
        return self._catalog.keys.find(text)

    def list_keys(self, tenant: str | None = None) -> tuple[KeyRecord, ...]:
        """Every key ever made, revoked ones too, newest first; of one tenant if it is named."""
        return self._catalog.keys.list(None if tenant is None else check_name("tenant", tenant))

    def revoke_key(self, key_id: str) -> KeyRecord:
        """The key is unknown from now on, to every process. Idempotent. Raises: NotFound."""
        return self._catalog.keys.revoke(key_id)
