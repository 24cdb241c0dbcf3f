"""Whose request this is. The one place that turns a request into a tenant: every route gets it through `Tenant`."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from .context import Context


def tenant_of(services: Context) -> str:
    """There are no API keys, so there is one tenant, whatever a request claims."""
    return services.default_tenant


Tenant = Annotated[str, Depends(tenant_of)]
