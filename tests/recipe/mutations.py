"""Strategies for bad recipes: built from the schema, and shipped recipes with something wrong in them."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from ftune.recipe import json_schema

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path.read_text(encoding="utf-8") for path in RECIPES.glob("*.yaml"))

SCALARS = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 1e-320, 1e308, 0.1),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "a", "lora", "null", "1", "1e999", "0x10", "yes", "~"),
    *("~nobody/x", "..", "/", "/dev/null", "/dev/zero", "data.jsonl", "package://", "package://os/../x", "org/name"),
    *(
        "package://yaml/../x.gguf",
        "package://a/" + "b/" * 50,
        "https://user:password1@host/x?token=abc",
        "(",
        "a" * 300,
    ),
    *("\u4f59", "\x07", "\x00", "\x1b[2J", "\u202e", "\ufeff", "\u2028", "\U0001f600", "a\nb", "C:\\x", "*", "&x"),
]
"""What no field, or only some field, can take."""

PIECES = [
    *(
        "\t",
        "  ",
        "\n",
        "\r",
        ":",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "&a ",
        "*a",
        "<<: *a",
        "<<: [*a, *a]",
        "!!str ",
    ),
    *(
        "!!python/object/apply:os.system [id]",
        "!x ",
        "#",
        "'",
        '"',
        "|\n",
        ">-\n",
        "? ",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
    ),
    *("null", "true", "1", "-1", ".inf", ".nan", "1e999", "9" * 5000, "\u4f59", "\x00", "\x1b[2J", "\ufeff", "\u2028"),
    *("@", "%", "\\", "[" * 30, "{a: " * 30, "&a [*a]", "model:", "method: {name: lora}", "\ud800", "\x85", "=", "!"),
]
"""Text that YAML or a recipe may trip over."""

BYTES = [b"\xff", b"\xfe\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\x80", b"\r", b"\xef\xbb\xbf"]


# --- from the schema ---


def of_schema(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of which most have the type that a schema asks for, and some are anything."""
    return st.one_of(_right(node), _right(node), _right(node), st.sampled_from(SCALARS))


@cache
def _defined(name: str) -> st.SearchStrategy[Any]:
    return st.deferred(lambda: of_schema(json_schema()["$defs"][name]))


def _right(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "$ref" in node:
        return _defined(node["$ref"].rpartition("/")[2])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in node:
            return st.one_of([of_schema(option) for option in node[several]])
    if "const" in node:
        return st.just(node["const"])
    if "enum" in node:
        return st.sampled_from(node["enum"])
    match node.get("type"):
        case "object":
            return _object(node)
        case "array":
            return st.lists(of_schema(node.get("items", {})), max_size=3)
        case "integer":
            return st.integers(-2, 40) | st.integers()
        case "number":
            return st.floats() | st.floats(0, 1) | st.integers(-1, 10)
        case "boolean":
            return st.booleans()
        case "string":
            return st.text(max_size=8) | st.sampled_from(["data.jsonl", "org/name", "runs/x", "all-linear", "x.gguf"])
        case _:
            return st.sampled_from(SCALARS)


def _object(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    known = node.get("properties", {})
    required = {name: of_schema(known[name]) for name in known if name in node.get("required", ())}
    optional = {name: of_schema(known[name]) for name in known if name not in required}
    return st.fixed_dictionaries(required, optional=optional)


@cache
def schema_recipes() -> st.SearchStrategy[str]:
    """Recipes with fields, types and bounds of the schema, as YAML text."""
    return _object(json_schema()).flatmap(lambda data: st.sampled_from([_flow(data), _block(data)]))


def _flow(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)  # with NaN and Infinity, as no JSON should


def _block(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


# --- shipped recipes, changed ---


@st.composite
def changed_trees(draw: st.DrawFn) -> str:
    """A shipped recipe with values deleted, duplicated, swapped, retyped, nested or shared."""
    data = yaml.safe_load(draw(st.sampled_from(SHIPPED)))
    for _ in range(draw(st.integers(1, 5))):
        places = list(_places(data))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        other, other_key = draw(st.sampled_from(places))
        match draw(st.sampled_from("delete rename swap retype nest list share deep".split())):
            case "delete":
                del parent[key]
            case "rename":
                value = parent.pop(key)
                if isinstance(parent, dict):
                    parent[draw(st.sampled_from([*SCALARS[:-1], str(key)[:-1], f"{key}s", other_key]))] = value
            case "swap":
                parent[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(parent[key])
            case "retype":
                parent[key] = draw(st.sampled_from(SCALARS) | st.integers() | st.floats() | st.text(max_size=5))
            case "nest":
                parent[key] = {str(other_key): parent[key]}
            case "list":
                parent[key] = [parent[key]] * draw(st.sampled_from([0, 1, 2, 60]))
            case "share":  # the same object twice: YAML writes an anchor and an alias
                parent[key] = other[other_key] if not _holds(other[other_key], parent) else 1
            case _:
                for _ in range(draw(st.sampled_from([3, 19, 25, 100]))):
                    parent[key] = [parent[key]]
    return _block(data)


def _places(data: Any, seen: set[int] | None = None) -> Any:
    """Every (container, key); what is shared is entered once."""
    seen = set() if seen is None else seen
    if id(data) in seen:
        return
    seen.add(id(data))
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        yield from _places(value, seen)


def _holds(value: Any, container: Any) -> bool:
    return value is container or any(parent[key] is container for parent, key in _places(value))


@st.composite
def changed_texts(draw: st.DrawFn) -> str:
    """A shipped recipe with lines deleted, duplicated, swapped and shifted, and pieces put in."""
    lines = [line for line in draw(st.sampled_from(SHIPPED)).split("\n") if line.strip() and line.strip()[0] != "#"]
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(lines) - 1))
        line = lines[at]
        match draw(st.sampled_from("delete duplicate swap indent outdent insert replace value".split())):
            case "delete":
                lines[at] = ""
            case "duplicate":
                lines.insert(at, line)
            case "swap":
                other = draw(st.integers(0, len(lines) - 1))
                lines[at], lines[other] = lines[other], line
            case "indent":
                lines[at] = draw(st.sampled_from([" ", "\t", "  ", "- "])) + line
            case "outdent":
                lines[at] = line.lstrip()
            case "insert":
                column = draw(st.integers(0, len(line)))
                lines[at] = line[:column] + draw(st.sampled_from(PIECES)) + line[column:]
            case "replace":
                lines[at] = draw(st.sampled_from(PIECES) | st.text(max_size=6))
            case _:
                key, colon, _ = line.partition(":")
                lines[at] = f"{key}{colon} {draw(st.sampled_from(PIECES))}"
    return "\n".join(lines)


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    """A changed recipe in broken encodings."""
    text = draw(changed_texts()).encode("utf-8", errors="surrogatepass")
    match draw(st.sampled_from("insert cut utf-16 latin-1 cr".split())):
        case "insert":
            at = draw(st.integers(0, len(text)))
            return text[:at] + draw(st.sampled_from(BYTES)) + text[at:]
        case "cut":
            return text[: draw(st.integers(0, len(text)))]
        case "cr":
            return text.replace(b"\n", b"\r")
        case encoding:
            return text.decode("utf-8", errors="ignore").encode(encoding, errors="replace")


# --- overrides ---


@cache
def _fields() -> list[str]:
    """Every dotted field of the schema, of all methods."""
    schema, found = json_schema(), {""}

    def walk(node: dict[str, Any], prefix: str, depth: int) -> None:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        for option in (
            node,
            *node.get("anyOf", ()),
            *node.get("oneOf", ()),
            *([node["items"]] if "items" in node else []),
        ):
            if option is not node and depth < 8:
                walk(option, prefix, depth + 1)
        for name, inner in node.get("properties", {}).items():
            found.add(f"{prefix}{name}")
            walk(inner, f"{prefix}{name}.", depth + 1)

    walk(schema, "", 0)
    return sorted(found)


@st.composite
def options(draw: st.DrawFn) -> str:
    """A ``--set`` option: a field or something like one, and a value of any kind."""
    key = draw(st.sampled_from(_fields()))
    match draw(st.sampled_from("field field index deeper typo any".split())):
        case "index":
            key += draw(st.sampled_from([".0", ".1", ".99", ".-1", ".999999", ".9999999", ".\u0663"]))
        case "deeper":
            key += draw(st.sampled_from([".x", ".name", ".", "..", ".x" * 30]))
        case "typo":
            at = draw(st.integers(0, len(key)))
            key = key[:at] + draw(st.sampled_from(["", "x", " ", ".", "\t", "\x00", "\u4f59"])) + key[at + 1 :]
        case "any":
            key = draw(st.text(max_size=8))
    value = draw(
        st.sampled_from(PIECES)
        | st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
        | st.sampled_from(SCALARS).map(_flow)
        | schema_recipes()
        | st.text(max_size=8)
    )
    return f"{key}{draw(st.sampled_from(['=', '=', '=', '', '==', '= ']))}{value}"
