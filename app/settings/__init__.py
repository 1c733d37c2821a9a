"""Hides where the configuration comes from: `load` makes frozen `Settings` of a file and the environment, or refuses.

`grammar` and `deployments` have the names, `values` what they hold, `catalog` what is known of the vendors' models,
`checks` what must fit together, `cautions` what may still go wrong; `places` and `wording` make the messages;
`description`, `verdicts` and `tables` show what was understood and found.
"""

from app.settings.catalog import CATALOG, catalog_rows, usd_per_million
from app.settings.cautions import cautions, retirements
from app.settings.deployments import DeploymentSettings, LocalDeployment, RemoteDeployment
from app.settings.description import describe
from app.settings.grammar import ModelFacts, ModelSettings, ServerSettings, Settings, TenantSettings
from app.settings.reading import find, load
from app.settings.tables import Row, json_lines, table
from app.settings.values import server_url, webhook_url
from app.settings.verdicts import verdict

__all__ = [
    "CATALOG",
    "DeploymentSettings",
    "LocalDeployment",
    "ModelFacts",
    "ModelSettings",
    "RemoteDeployment",
    "Row",
    "ServerSettings",
    "Settings",
    "TenantSettings",
    "catalog_rows",
    "cautions",
    "describe",
    "find",
    "json_lines",
    "load",
    "retirements",
    "server_url",
    "table",
    "usd_per_million",
    "verdict",
    "webhook_url",
]
