"""Hides what of the grammar later versions will take."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

LATER: Final[Mapping[str, Mapping[str, tuple[object, ...]]]] = MappingProxyType(
    {
        "server": {"workers": (1,), "secret": ("", "env:EMBEDGATE_SECRET"), "admin_port": (0,)},
        "stores": {
            "redis_url": ("",),
            "database_url": ("",),
            "cache_redis_url": ("",),
            "max_replicas": (4,),
        },
        "cache": {
            "redis_ttl_s": (604800,),
            "sql_max_bytes": (0,),
            "sql_max_age_days": (0,),
            "float16": (False,),
            "compression": ("none",),
        },
        "tenants": {
            "budget_usd_per_month": (0,),
            "budget_usd_per_day": (0,),
            "requests_per_minute": (0,),
            "tokens_per_minute": (0,),
            "max_in_flight": (0,),
            "webhook_url": ("",),
            "cache_group": ("",),
        },
    }
)
"""Names of the grammar that this version takes only with a value that changes nothing."""

LATER_SECTIONS: Final = frozenset({"bulk", "tracing", "embed", "index"})
