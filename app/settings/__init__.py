"""Hides where the configuration comes from: `load` makes frozen `Settings` of a file and the environment, or refuses.

`grammar` has the names, `catalog` what is known of the vendors' models, `checks` what must fit together; `places` and
`wording` make the messages, `description` shows what was understood.
"""

from app.settings.catalog import CATALOG
from app.settings.description import describe
from app.settings.grammar import (
    DeploymentSettings,
    LocalDeployment,
    ModelFacts,
    ModelSettings,
    RemoteDeployment,
    ServerSettings,
    Settings,
    TenantSettings,
)
from app.settings.reading import find, load

__all__ = [
    "CATALOG",
    "DeploymentSettings",
    "LocalDeployment",
    "ModelFacts",
    "ModelSettings",
    "RemoteDeployment",
    "ServerSettings",
    "Settings",
    "TenantSettings",
    "describe",
    "find",
    "load",
]
