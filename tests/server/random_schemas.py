"""Random JSON schemas, of what JSON is made of and in the ways in which schemas are written."""

import random

STRING_FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email"]
NAMES = ["a", "b", "name", "größe", "x y", 'quo"te', "日本", "id", "items", "type", "$ref"]


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    """A schema that something fits, and that most things do not fit."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    if depth < 3:
        kinds += ["object", "object", "object", "array", "array", "anyOf", "types"]
    if depth == 0:
        kinds = ["object", "object", "array", "anyOf", "definitions", *kinds]
    return _MAKERS[rng.choice(kinds)](rng, depth)


def _string(rng: random.Random, _: int) -> dict:
    low = rng.randrange(4)
    lengths = {"minLength": low, "maxLength": low + rng.randrange(1, 12)}
    return {"type": "string"} | {key: lengths[key] for key in lengths if rng.random() < 0.6}


def _integer(rng: random.Random, _: int) -> dict:
    low = rng.randrange(-1000, 1000)
    limits = {"minimum": low, "maximum": low + rng.randrange(1, 500)}
    return {"type": "integer"} | {key: limits[key] for key in limits if rng.random() < 0.6}


def _number(rng: random.Random, _: int) -> dict:
    low = round(rng.uniform(-50, 50), 2)
    return {"type": "number"} | ({"minimum": low, "exclusiveMaximum": low + 7.5} if rng.random() < 0.5 else {})


def _object(rng: random.Random, depth: int) -> dict:
    names = rng.sample(NAMES, rng.randrange(1, 5))
    schema: dict = {"type": "object", "properties": {name: random_schema(rng, depth + 1) for name in names}}
    schema["required"] = rng.sample(names, rng.randrange(len(names) + 1))
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    elif rng.random() < 0.5:
        schema["additionalProperties"] = random_schema(rng, depth + 1)
    return schema


def _array(rng: random.Random, depth: int) -> dict:
    schema: dict = {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.randrange(1, 5)}
    if rng.random() < 0.4:
        schema["minItems"] = rng.randrange(schema["maxItems"] + 1)
    if rng.random() < 0.2:
        schema["prefixItems"] = [random_schema(rng, depth + 1)]
        schema["minItems"] = 1
    return schema


def _definitions(rng: random.Random, depth: int) -> dict:
    """A list that refers to itself, and a named part."""
    node = {
        "type": "object",
        "properties": {"value": {"$ref": "#/$defs/value"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["value"],
        "additionalProperties": False,
    }
    return node | {"$defs": {"value": random_schema(rng, depth + 1)}}


_MAKERS = {
    "string": _string,
    "integer": _integer,
    "number": _number,
    "boolean": lambda rng, depth: {"type": "boolean"},
    "null": lambda rng, depth: {"type": "null"},
    "enum": lambda rng, depth: {"enum": rng.sample(["red", "grün", 'a"b', 1, -2.5, None, True, [1], {"k": 0}], 3)},
    "const": lambda rng, depth: {"const": rng.choice(["fixed", 7, None, [1, "x"]])},
    "pattern": lambda rng, depth: {"type": "string", "pattern": rng.choice(["^[A-Z]{2}-\\d+$", "^(ab|c)*$", "x.y"])},
    "format": lambda rng, depth: {"type": "string", "format": rng.choice(STRING_FORMATS)},
    "object": _object,
    "array": _array,
    "anyOf": lambda rng, depth: {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]},
    "types": lambda rng, depth: {"type": rng.sample(["string", "integer", "boolean", "null"], 2)},
    "definitions": _definitions,
}
