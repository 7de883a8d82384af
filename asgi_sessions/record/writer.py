"""How a model is written to a store: as pydantic writes it for everybody, and with what is for stores only.

Whatever a framework does with a record that a handler returns (`model_dump`, a response model, a field of
another model) ends in the model's own serialiser. So that one leaves out what no client may see, and records
are written by another one, which is compiled once per model.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import SchemaSerializer

STORED_ONLY = frozenset({"session_id", "fingerprint"})
"""The fields that records have and answers have not: one is a password, one tells about the client."""

_Schema = dict[str, Any]


@lru_cache(maxsize=256)
def writer_of(model: type[BaseModel], public: SchemaSerializer) -> SchemaSerializer:
    """The serialiser of a model's records; `public` is the model's own, another one after a rebuild."""
    schema: _Schema = dict(model.__pydantic_core_schema__)
    definitions: list[_Schema] = schema["definitions"] if schema["type"] == "definitions" else []
    node = _find("model", schema, definitions)
    fields = _find("model-fields", node["schema"], definitions)
    stored = {
        name: {key: value for key, value in field.items() if key != "serialization_exclude"}
        if name in STORED_ONLY
        else field
        for name, field in fields["fields"].items()
    }
    # under another class than its own, or pydantic-core takes the serialiser that the class has already
    changed = {**node, "cls": BaseModel, "schema": {**fields, "fields": stored}}
    changed.pop("ref", None)
    whole: Any = {"type": "definitions", "schema": changed, "definitions": definitions}
    return SchemaSerializer(whole, node.get("config"))


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
