"""The serialisers of a model's records, compiled once.

Whatever a framework does with a record that a handler returns (`model_dump`, a response model, a field of
another model) ends in the model's own serialiser. That one leaves out what no client may see, so records are
written by others, which are made here of the same schema.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel
from pydantic_core import SchemaSerializer

_STORED_ONLY = frozenset({"session_id", "fingerprint"})


class StoredOnly:
    """Marks one more field of this kind: a model of the app's own may have another under the same name."""


def stored_only(model: type[BaseModel]) -> frozenset[str]:
    """The fields that records have and answers have not: one is a password, the others tell of the client."""
    fields = model.__pydantic_fields__.items()
    return _STORED_ONLY.union(
        name for name, field in fields if any(isinstance(each, StoredOnly) for each in field.metadata)
    )


_Schema = dict[str, Any]


def compile_writer(
    model: type[BaseModel], names: Collection[str] | None = None, *, extras: bool = True
) -> SchemaSerializer:
    """The serialiser of these fields of a model's records, or of all; with `extras` of unknown ones too.

    Computed fields are left out: they come back by themselves.
    """
    node, definitions = _node_of(model)
    inner = _find("model-fields", node["schema"], definitions)
    hidden = stored_only(model)
    fields = {
        name: {key: value for key, value in field.items() if key != "serialization_exclude"}
        if name in hidden
        else field
        for name, field in inner["fields"].items()
        if names is None or name in names
    }
    inner = {**inner, "fields": fields, "computed_fields": []}
    config: Any = dict(node.get("config", {}))
    if not extras:
        config["extra_fields_behavior"] = "ignore"
    # under another class than its own, or pydantic-core takes the serialiser that the class has already
    changed = {**node, "cls": BaseModel, "schema": inner, "config": config}
    changed.pop("ref", None)
    whole: Any = {"type": "definitions", "schema": changed, "definitions": definitions}
    return SchemaSerializer(whole, config)


def has_own_serializer(model: type[BaseModel]) -> bool:
    """Whether the model as a whole is written by a function, not field by field."""
    return "serialization" in _node_of(model)[0]


def _node_of(model: type[BaseModel]) -> tuple[_Schema, list[_Schema]]:
    schema: _Schema = dict(model.__pydantic_core_schema__)
    definitions: list[_Schema] = schema["definitions"] if schema["type"] == "definitions" else []
    return _find("model", schema, definitions), definitions


def _find(kind: str, schema: _Schema, definitions: list[_Schema]) -> _Schema:
    """The node of this kind within what validators, serialisers and definitions put around it."""
    around: _Schema = {}
    while schema["type"] != kind:
        if "serialization" in schema:
            around = {"serialization": schema["serialization"]}
        if schema["type"] == "definition-ref":
            schema = next(each for each in definitions if each.get("ref") == schema["schema_ref"])
        else:
            schema = schema["schema"]
    return {**schema, **around}
