"""Hides the words in which /openapi.json describes what operators do with tenants, projects and keys."""

import msgspec

from app.api.openapi import ADMIN, NO_KEY, UNAVAILABLE, Schema, answer, refusal
from app.tenant_desk import Budget, NewKey, NewTenant, Rotation, TenantTerms

_, _BODIES = msgspec.json.schema_components(
    (NewTenant, TenantTerms, Budget, NewKey, Rotation), ref_template="#/components/schemas/{name}"
)


def _row(kind: type, **more: Schema) -> Schema:
    """What operators are shown of a thing: what it was made from, and more."""
    usd = {"type": ["string", "null"], "description": "In dollars, exactly; null: no bound."}
    given = {name: usd if "usd" in name else field for name, field in _BODIES[kind.__name__]["properties"].items()}
    return {"type": "object", "properties": {"object": {"type": "string"}, **given, **more}}


_NAME = {"type": "string"}
_BOOKED = {f"spent_usd_{span}": {"type": "string", "description": "By UTC."} for span in ("today", "this_month")}
_PROJECTS = {"type": "array", "items": {"$ref": "#/components/schemas/Project"}}
_SHOWN = {
    "Tenant": _row(NewTenant, **_BOOKED, projects=_PROJECTS, created_at=_NAME, configured={"type": "boolean"}),
    "Project": _row(Budget, tenant=_NAME, name=_NAME, **_BOOKED),
    "WebhookSecret": {"type": "object", "properties": dict.fromkeys(("object", "tenant", "secret"), _NAME)},
}
_ROWS: list[Schema] = [
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 1000}},
    {"name": "after", "in": "query", "schema": {"type": "string"}, "description": "Name or id of the last row."},
]


def _desk(name: str, says: str, body: type | None = None, *parameters: Schema, shown: str = "Object") -> Schema:
    extra: Schema = {"security": ADMIN, "parameters": [*parameters]}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    answers = {
        200: answer(says, shown), 400: refusal("The request is not understood."), 401: NO_KEY,
        404: refusal("There is no such thing."), 503: UNAVAILABLE,
    }  # fmt: skip
    return {"operation_id": name, "responses": answers, "openapi_extra": extra}


TENANTS = _desk("listTenants", "Tenants by name.", None, *_ROWS)
TENANT_CREATE = _desk("createTenant", "The tenant.", NewTenant, shown="Tenant")
TENANT = _desk("retrieveTenant", "The tenant and its projects, and what they spent.", shown="Tenant")
TENANT_WEBHOOK_SECRET = _desk("retrieveWebhookSecret", "What verifies its webhooks.", shown="WebhookSecret")
TENANT_UPDATE = _desk("updateTenant", "The tenant.", TenantTerms, shown="Tenant")
TENANT_DELETE = _desk("deleteTenant", "That it is deleted.")
PROJECT = _desk("retrieveProject", "The project.", shown="Project")
PROJECT_SET = _desk("setProject", "The project.", Budget, shown="Project")
PROJECT_DELETE = _desk("deleteProject", "That it is deleted.")
KEYS = _desk(
    "listKeys", "Keys by public id.", None,
    {"name": "tenant", "in": "query", "schema": {"type": "string"}, "description": "Only of this one."}, *_ROWS,
)  # fmt: skip
KEY_CREATE = _desk("createKey", "The key; the field `key` is shown this once.", NewKey)
KEY_ROTATE = _desk("rotateKey", "The key with its new secret.", Rotation)
KEY_REVOKE = _desk("revokeKey", "The key as it ended.")

SCHEMAS = {**_BODIES, **_SHOWN}
"""What these routes take and answer, by name."""
