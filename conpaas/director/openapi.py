"""The public API described: an OpenAPI 3.1 document made of the endpoints' declarations, and a page for it.

Knows nothing of what the commands do; what is not declared in `core.messages.public` is not described here.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from aiohttp import web
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core.core_schema import ModelSchema

from conpaas.core.errors import PROBLEM_TYPE, all_errors
from conpaas.core.messages import public
from conpaas.core.messages.base import Endpoint, Json, Message, Who
from conpaas.core.messages.model import OperationView

BASE = public.P
SWAGGER = "/static/vendor/swagger-ui-dist"
"""Where the web UI serves the pinned files of swagger-ui-dist."""

_Mode = Literal["validation", "serialization"]
_Model = tuple[type[Message], _Mode]


def endpoints() -> dict[str, Endpoint]:
    """Return every endpoint of the public API by the name of its constant."""
    return {name: value for name, value in vars(public).items() if isinstance(value, Endpoint)}


@functools.cache
def document(version: str) -> Json:
    """Return the OpenAPI 3.1 document of the public API; `version` is that of the software."""
    declared = endpoints()
    references, definitions = models_json_schema(
        _models(declared.values()), ref_template="#/components/schemas/{model}", schema_generator=_Schemas
    )
    schemas = {**definitions["$defs"], "Problem": _PROBLEM}
    paths: dict[str, Json] = {}
    for name, endpoint in declared.items():
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = {
            "operationId": name.lower(),
            **_operation(endpoint, references, schemas),
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "ConPaaS", "version": version, "description": _ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(tag for e in declared.values() for tag in e.tags)],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {"Problem": _problem_response()},
            "securitySchemes": {"bearer": _BEARER},
        },
    }


def routes(version: str) -> Sequence[web.RouteDef]:
    """Return the routes of the document and of the page that shows it; anyone may read them."""
    body = json.dumps(document(version), ensure_ascii=False).encode()

    async def read_document(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    async def read_page(_: web.Request) -> web.Response:
        return web.Response(text=_PAGE, content_type="text/html", headers=_PAGE_HEADERS)

    async def read_script(_: web.Request) -> web.Response:
        return web.Response(text=_SCRIPT, content_type="text/javascript")

    return [
        web.get(f"{BASE}/openapi.json", read_document),
        web.get(f"{BASE}/docs", read_page),
        web.get(f"{BASE}/docs/start.js", read_script),
    ]


# Schemas


class _Schemas(GenerateJsonSchema):
    """Schemas without titles that repeat the names; answers may grow fields, and show their secrets."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - the contract of pydantic
        """Say no."""
        return False

    def model_schema(self, schema: ModelSchema) -> dict[str, Any]:
        """Return the schema of a message."""
        described = super().model_schema(schema)
        if self.mode == "serialization":
            described.pop("additionalProperties", None)
            for field in described.get("properties", {}).values():
                for variant in (field, *field.get("anyOf", ())):
                    variant.pop("writeOnly", None)
        return described


def _models(declared: Iterable[Endpoint]) -> list[_Model]:
    """Return the messages in use, once each: what people send is validated, what they get is serialized."""
    found: dict[_Model, None] = {}
    for endpoint in declared:
        for kind in (endpoint.request, endpoint.query):
            if kind is not None:
                found[kind, "validation"] = None
        if endpoint.response is not None:
            found[endpoint.response, "serialization"] = None
    return list(found)


# Operations


def _operation(endpoint: Endpoint, references: Mapping[Any, Json], schemas: Mapping[str, Json]) -> Json:
    described: Json = {
        "summary": endpoint.summary,
        "tags": list(endpoint.tags),
        "parameters": [*_path_parameters(endpoint), *_query(endpoint, references, schemas)],
        "responses": {
            str(endpoint.status): _answer(endpoint, references),
            "default": {"$ref": "#/components/responses/Problem"},
        },
        "security": [] if Who.ANYONE in endpoint.allow else [{"bearer": [endpoint.scope]}],
        "x-allow": sorted(endpoint.allow),
    }
    if endpoint.request is not None:
        content = {"application/json": {"schema": references[endpoint.request, "validation"]}}
        described["requestBody"] = {"content": content, "required": True}
    elif endpoint.upload:
        described["requestBody"] = {
            "description": "The file itself, as it is: no form around it. It is streamed.",
            "content": {"application/octet-stream": {"schema": {}}},
            "required": True,
        }
    if endpoint.response is OperationView and endpoint.method != "GET":
        described["description"] = _LONG
        if "{service}" in endpoint.path:
            described["parameters"].append(_IF_MATCH)
    return described


def _path_parameters(endpoint: Endpoint) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", endpoint.path)
    ]


def _query(endpoint: Endpoint, references: Mapping[Any, Json], schemas: Mapping[str, Json]) -> Iterable[Json]:
    if endpoint.query is None:
        return
    reference = references[endpoint.query, "validation"]["$ref"]
    model = schemas[reference.rpartition("/")[2]]
    for name, schema in model["properties"].items():
        yield {
            "name": name,
            "in": "query",
            "required": name in model.get("required", ()),
            "schema": {key: value for key, value in schema.items() if key != "description"},
            "description": schema.get("description", ""),
        }


def _answer(endpoint: Endpoint, references: Mapping[Any, Json]) -> Json:
    if endpoint.download:
        return {
            "description": "The file, streamed.",
            "content": {"application/octet-stream": {"schema": {}}},
        }
    if endpoint.response is None:
        return {"description": "Done."}
    schema = references[endpoint.response, "serialization"]
    if endpoint.events:
        return {"description": _EVENTS, "content": {"text/event-stream": {"schema": schema}}}
    return {
        "description": (endpoint.response.__doc__ or "Done.").strip(),
        "content": {"application/json": {"schema": schema}},
    }


def _problem_response() -> Json:
    kinds = sorted(all_errors().values(), key=lambda kind: (kind.status, kind.code))
    rows = [f"| {kind.status} | `{kind.code}` | {(kind.__doc__ or '').strip()} |" for kind in kinds]
    table = "\n".join(["| status | code | |", "|---|---|---|", *rows])
    return {
        "description": f"What went wrong, and what to do next.\n\n{table}\n",
        "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


_PROBLEM: Json = {
    "type": "object",
    "description": "An RFC 9457 problem document.",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:conpaas:error:no-credit"]},
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "description": "What failed, with the value, for people."},
        "code": {"type": "string", "description": "What failed, for programs."},
        "value": {"type": ["string", "number", "boolean", "null"], "description": "The offending value."},
        "hint": {"type": "string", "description": "What to do next."},
    },
}

_BEARER: Json = {
    "type": "http",
    "scheme": "bearer",
    "description": "A session's token, from `login`; or an API token that has the scope a command needs.",
}

_IF_MATCH: Json = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "The service's `generation` as you have seen it: if it is another by now, 412.",
}

_ABOUT = """\
Create services, start them, give them code, scale them, look at them, and give everything back.

Times are RFC 3339 in UTC, sizes are in bytes, durations in seconds. Errors are RFC 9457 problem documents
with `code`, `value` and `hint`. Lists come in pages: ask again with `cursor` set to the `next` of the last page.
"""

_LONG = (
    "Answers at once; the work goes on. Follow it by its id, or by the live events. "
    "A `key` of your own makes it safe to repeat: the same key answers the same operation."
)

_EVENTS = "Server-sent events, each with one such document as its `data`, until either side hangs up."


# The page

_PAGE = f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ConPaaS API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{SWAGGER}/swagger-ui.css">
<script src="{SWAGGER}/swagger-ui-bundle.js" defer></script>
<script src="{BASE}/docs/start.js" defer></script>
</head>
<body>
<noscript>This page needs JavaScript; <a href="{BASE}/openapi.json">the document</a> does not.</noscript>
<main id="api"></main>
</body>
</html>
"""

_SCRIPT = f"""\
"use strict";
SwaggerUIBundle({{
  url: "{BASE}/openapi.json",
  dom_id: "#api",
  deepLinking: true,
  docExpansion: "list",
  filter: true,
  tryItOutEnabled: true,
  validatorUrl: null,
}});
"""

_PAGE_HEADERS = {
    # Swagger UI writes style attributes and shows its icons as data; it needs nothing else that the UI's own
    # pages do not.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
