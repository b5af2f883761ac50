"""/docs: the reference of the HTTP APIs as one page of HTML, made from the OpenAPI schema.

FastAPI's own page loads its scripts and styles from another host: it is empty without a network, and tells that
host who reads it. This page has neither scripts nor anything to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)
METHODS = ("get", "post", "put", "patch", "delete")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'self'; base-uri 'none'"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; }
h2 { margin-top: 2em; border-bottom: 1px solid #8886; }
summary { cursor: pointer; padding: .3em 0; }
code, summary b { font-family: ui-monospace, monospace; }
summary b { display: inline-block; min-width: 4.5em; }
table { border-collapse: collapse; margin: .5em 0 1em; width: 100%; }
td { border-top: 1px solid #8884; padding: .25em 1em .25em 0; vertical-align: top; }
"""


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """The reference page."""
    return HTMLResponse(page(request.app), headers={"Content-Security-Policy": POLICY})


@cache
def page(app: FastAPI) -> str:
    """The page of an app's routes, by tag."""
    schema = app.openapi()
    by_tag: dict[str, list[str]] = {}
    for path, item in schema["paths"].items():
        for method in METHODS:
            if operation := item.get(method):
                tag = (operation.get("tags") or ["server"])[0]
                by_tag.setdefault(tag, []).append(_operation(schema, method, path, operation))
    title, info = escape(schema["info"]["title"]), schema["info"]
    sections = "".join(f"<h2>{escape(tag)}</h2>{''.join(rows)}" for tag, rows in by_tag.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: the HTTP APIs</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title} {escape(info['version'])}</h1><p>{escape(info.get('description', ''))} "
        f'For programs: <a href="/openapi.json">/openapi.json</a>.</p>{sections}</body></html>'
    )


def _operation(schema: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = [_row(p["name"], p["schema"], p.get("description", ""), p.get("required", False))
                  for p in operation.get("parameters", ())]  # fmt: skip
    body = operation.get("requestBody", {}).get("content", {})
    parts = [f"<p>{escape(operation.get('description', ''))}</p>", _table(parameters)]
    for media_type, content in body.items():
        parts.append(f"<p>Body, <code>{escape(media_type)}</code>:</p>")
        parts.append(_table(_fields(schema, content.get("schema", {}))))
    return (
        f"<details><summary><b>{method.upper()}</b><code>{escape(path)}</code> "
        f"{escape(operation.get('summary', ''))}</summary>{''.join(parts)}</details>"
    )


def _fields(schema: dict[str, Any], model: dict[str, Any]) -> Iterator[str]:
    """A row for each field of a body."""
    model = _resolved(schema, model)
    for name, field in model.get("properties", {}).items():
        yield _row(name, field, field.get("description", ""), name in model.get("required", ()))


def _resolved(schema: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    name = model.get("$ref", "").rpartition("/")[2]
    resolved: dict[str, Any] = schema["components"]["schemas"][name] if name else model
    return resolved


def _row(name: str, field: dict[str, Any], description: str, required: bool) -> str:
    default = field.get("default")
    notes = ["required"] if required else [f"default {default!r}"] if default not in (None, "", {}, []) else []
    text = "; ".join(filter(None, (description or field.get("title", ""), *notes)))
    return (
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_type(field))}</td><td>{escape(text)}</td></tr>"
    )


def _type(field: dict[str, Any]) -> str:
    """A field's type in a few words: integer, one of several values, or a list."""
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " | ".join(dict.fromkeys(t for f in field["anyOf"] if (t := _type(f)) != "null"))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("const") or field.get("type") or field.get("$ref", "").rpartition("/")[2] or "any")


def _table(rows: Any) -> str:
    text = "".join(rows)
    return f"<table>{text}</table>" if text else ""
