"""Text to Recipe: YAML 1.2 with positions, overrides from the command line, then the schema.

PyYAML's scanner and composer do the parsing; what they are lenient about is decided here. Numbers and
booleans are those of YAML 1.2's core schema (``2e-4`` is a number, ``no`` is a string), equal keys are
refused, and size, depth and aliases are bounded: a recipe from a stranger is refused in bounded time.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from ftune.methods import METHODS
from ftune.recipe.diagnose import error_paths, translate
from ftune.recipe.no_recipe import other_kind
from ftune.recipe.other_method import of_another_method
from ftune.recipe.places import KeyPath, Mistake, Position, Positions, Source, Span, dotted
from ftune.recipe.removed import take_removed
from ftune.recipe.rendering import fail
from ftune.recipe.schema import SHORT_FORMS, Recipe
from ftune.recipe.spelling import closest
from ftune.recipe.variables import Expanded, expand_variables, frozen
from ftune.regular import IrregularError, open_regular

__all__ = ["MAX_DEPTH", "Loaded", "is_plain_string", "load_recipe", "parse_recipe", "parse_source", "read_mapping"]

MAX_BYTES = 100_000
MAX_NODES = 5_000
"""Nodes after aliases are expanded, so an alias bomb stops here."""
MAX_DEPTH = 20


@dataclass(frozen=True)
class Loaded:
    """A recipe and where it came from.

    Attributes:
        recipe: The checked recipe.
        text: The file as written, without overrides.
        path: The file as the caller named it.
        raw: Plain data after overrides, short forms expanded.
        positions: Where each field is written, for problems found later.
        overrides: The ``key=value`` strings that were applied.
        notes: What an override did beside what it says.
    """

    recipe: Recipe
    text: str
    path: Path
    raw: dict[str, Any]
    positions: Positions
    overrides: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_recipe(path: Path, overrides: Sequence[str] = (), *, color: bool = False) -> Loaded:
    """Read, override and validate a recipe file.

    Args:
        path: The file; shown in messages as given.
        overrides: ``dotted.key=value`` strings, applied in order.
        color: Use ANSI colours in the reports.

    Raises:
        RecipeError: The file cannot be read, or the recipe or an override is wrong; names every mistake.
    """
    return parse_recipe(_read(path, color=color), str(path), overrides, color=color)


def _read(path: Path, *, color: bool) -> str:
    name = str(path)
    try:
        # One byte more than is allowed: a file may grow while it is read.
        with os.fdopen(open_regular(path, follow=True), "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise fail([_unreadable(path, error)], Source(name, ""), color=color) from error
    if other := other_kind(path, data):
        raise fail([other], Source(name, ""), color=color)
    if len(data) > MAX_BYTES:
        mistake = Mistake(f"the recipe is larger than {MAX_BYTES} bytes", help="is this a data file?")
        raise fail([mistake], Source(name, ""), color=color)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise fail([_not_utf8(name, data, error)], Source(name, ""), color=color) from error


def read_mapping(path: Path, *, color: bool = False) -> tuple[dict[str, Any], Positions]:
    """The plain data of a study's file, read as strictly as a recipe, and where each field is written.

    Raises:
        RecipeError: It cannot be read, or is no mapping; names every mistake.
    """
    source = Source(str(path), _read(path, color=color))
    positions = Positions(source)
    reader = _Builder(positions)
    raw: dict[str, Any] = {}
    wrong: Sequence[Mistake]
    try:
        raw = reader.document(source)
        wrong = reader.mistakes
    except _Refused as refused:
        wrong = refused.mistakes
    if wrong:
        raise fail([_of_study(mistake) for mistake in wrong], source, color=color)
    return raw, positions


def _of_study(mistake: Mistake) -> Mistake:
    """A mistake in the text of a recipe, as one of a study."""

    def renamed(text: str) -> str:
        quoted = text.split("`")  # every second part stands in backticks: what the user wrote
        quoted[::2] = [part.replace("recipe", "study") for part in quoted[::2]]
        return "`".join(quoted)

    return replace(mistake, message=renamed(mistake.message), help=mistake.help and renamed(mistake.help))


def parse_recipe(text: str, filename: str, overrides: Sequence[str] = (), *, color: bool = False) -> Loaded:
    """Override and validate a recipe given as text; see ``load_recipe``."""
    return parse_source(Source(filename, text), overrides, color=color)


def parse_source(source: Source, overrides: Sequence[str] = (), *, flag: str = "--set ", color: bool = False) -> Loaded:
    """Override and validate a recipe given as text; see ``load_recipe``.

    Args:
        source: The text and its name.
        overrides: ``dotted.key=value`` strings, applied in order.
        flag: What stands before an override where reports show it; empty where it was not given on a command line.
        color: Use ANSI colours in the reports.
    """
    positions = Positions(source)
    reader = _Builder(positions)
    notes: list[str] = []
    try:
        raw = reader.document(source)
        problems = list(reader.mistakes)
        expand(raw, positions)
        for rank, option in enumerate(overrides, start=1):
            try:
                problems += _override(raw, option, rank, positions, notes, flag)
            except _Refused as refused:
                problems += refused.mistakes
    except _Refused as refused:
        raise fail(refused.mistakes, source, color=color) from None
    problems += take_removed(raw, positions)
    recipe = None
    try:
        recipe = _validated(raw)
    except ValidationError as error:
        # A value that the parser refused stands as 0: what the schema says of that 0 is no news.
        known = {problem.span for problem in problems}
        problems += [mistake for mistake in translate(error, raw, positions) if mistake.span not in known]
    if problems or recipe is None:
        raise fail(problems, source, color=color)
    return Loaded(recipe, source.text, Path(source.name), raw, positions, tuple(overrides), tuple(notes))


def _validated(raw: dict[str, Any]) -> Recipe:
    """The recipe in plain data. Where a variable gave a string and no string can stand, it is read as YAML reads it.

    Strict: a string is no number and true is no 1. Sequences arrive as tuples, as the schema has them.
    """
    try:
        return Recipe.model_validate(frozen(raw), strict=True)
    except ValidationError as error:
        read_again = False
        for path in set(error_paths(error, raw)):
            parent: Any = raw
            try:
                for key in path[:-1]:
                    parent = parent[key]
                value = parent[path[-1]]
            except (KeyError, IndexError, TypeError):  # what is missing
                continue
            if isinstance(value, Expanded) and not isinstance(value.typed, str):
                parent[path[-1]], read_again = value.typed, True
        if not read_again:
            raise
    return Recipe.model_validate(frozen(raw), strict=True)


def _unreadable(path: Path, error: OSError) -> Mistake:
    if isinstance(error, FileNotFoundError):
        try:
            names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
        except OSError:
            return Mistake("there is no such recipe", help=f"`{path.parent}` does not exist")
        near = closest(path.name, names[:1000])
        return Mistake(
            "there is no such recipe",
            help=f"did you mean `{path.parent / near}`?" if near else "see `ftune init`",
        )
    if isinstance(error, IrregularError):
        help = _recipes_in(path) if error.kind == "a directory" else "write the recipe to a file"
        return Mistake(f"the recipe is {error.kind}", help=help)
    return Mistake(f"the recipe cannot be read: {error.strerror}")


def _recipes_in(directory: Path) -> str:
    """What to name instead of a directory."""
    if (directory / "run.json").is_file():
        return "it is a run: `ftune eval`, `predict`, `merge` and `chat` take one; train takes the recipe's file"
    try:
        found = sorted(entry for entry in directory.iterdir() if entry.suffix.lower() in (".yaml", ".yml"))
    except OSError:
        found = []
    if not found:
        return "there is no .yaml file in it; `ftune init` writes a recipe"
    more = f", or another of its {len(found)} .yaml files" if len(found) > 1 else ""
    return f"name the file: `{found[0]}`{more}"


def _not_utf8(name: str, data: bytes, error: UnicodeDecodeError) -> Mistake:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Mistake("the recipe is UTF-16", help="save it as UTF-8")
    before = data[: error.start].decode("utf-8")
    source = Source(name, before + data[error.start :].decode("utf-8", errors="replace"))
    line = len(Source(name, before).lines) - 1
    column = len(Source(name, before).lines[line])
    message = f"byte 0x{data[error.start]:02x} is not UTF-8"
    return Mistake(message, Span(source, line, column), help="save the recipe as UTF-8")


# --- YAML ---


class _Refused(Exception):
    """Parsing cannot go on."""

    def __init__(self, *mistakes: Mistake) -> None:
        super().__init__()
        self.mistakes = mistakes


class _Bound(yaml.MarkedYAMLError):
    """Valid YAML that a recipe has no use for."""

    def __init__(self, message: str, event: Any) -> None:
        super().__init__(problem=message, problem_mark=event.start_mark)


class _Yaml12(Reader, Scanner, Parser, Composer, BaseResolver):
    """Text to nodes: PyYAML's scanner and parser, YAML 1.2's core schema, bounded depth and size."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0
        self.nodes = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose one node, refusing what a recipe has no use for."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH:
            raise _Bound(f"a recipe cannot be nested deeper than {MAX_DEPTH} levels", event)
        if self.nodes > MAX_NODES:
            raise _Bound(f"a recipe cannot hold more than {MAX_NODES} values", event)
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _Bound(f"the tag `{tag}` is not allowed in a recipe", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))

for _tag, _pattern, _first in [
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    (_FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
]:
    _Yaml12.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


class _Builder:
    """Nodes to plain data, noting where each field is written.

    Args:
        positions: Where to note it.
        prefix: The path under which the document stands (the key of an override).
    """

    def __init__(self, positions: Positions, prefix: KeyPath = ()) -> None:
        self.positions = positions
        self.prefix = prefix
        self.mistakes: list[Mistake] = []
        self.source = positions.source
        self.column = 0
        self._open: set[int] = set()
        self._count = 0

    def document(self, source: Source) -> dict[str, Any]:
        """The recipe in a file: one document, whose root is a mapping."""
        self.source = source
        node = self._compose(source.text)
        if node is None:
            raise _Refused(
                Mistake("the recipe is empty", help="the shortest one names model, method, data and output_dir")
            )
        if not isinstance(node, MappingNode):
            message = "a recipe is a mapping of fields, not " + (
                "a list" if isinstance(node, SequenceNode) else "a single value"
            )
            raise _Refused(Mistake(message, self._span(node), "write `key: value`"))
        value = self._build(node, ())
        assert isinstance(value, dict)
        return value

    def option(self, source: Source, column: int, key: Span) -> Any:
        """The value of an override, which begins at a column of its source's only line."""
        self.source, self.column = source, column
        node = self._compose(source.text[column:])
        if node is None:
            at = Span(source, 0, column, len(source.text) - column)
            raise _Refused(Mistake("this is a comment, not a value", at, "put it in quotes"))
        self.positions.at[self.prefix] = Position(key, self._span(node), not isinstance(node, ScalarNode))
        return self._build(node, self.prefix)

    def _compose(self, text: str) -> Node | None:
        try:
            loader = _Yaml12(text)
            node = loader.get_node() if loader.check_node() else None
            if loader.check_node():
                mark = loader.peek_event().start_mark  # type: ignore[no-untyped-call]
                message = "a recipe is one document, and here begins another"
                raise _Refused(Mistake(message, self._mark(mark), "one file for each recipe"))
            return node
        except yaml.MarkedYAMLError as error:
            raise _Refused(self._syntax(error)) from None
        except ReaderError as error:
            before = text[: error.position]
            lines = Source("", before).lines
            span = Span(self.source, len(lines) - 1, len(lines[-1]) + self.column)
            code = error.character if isinstance(error.character, int) else ord(error.character)
            raise _Refused(Mistake(f"character U+{code:04X} is not allowed in YAML", span)) from None

    def _build(self, node: Node, path: KeyPath) -> Any:
        self._count += 1
        if self._count > MAX_NODES:
            message = f"aliases expand to more than {MAX_NODES} values"
            raise _Refused(Mistake(message, self._span(node), "write fewer, or without aliases"))
        if isinstance(node, ScalarNode):
            return self._with_variables(node)
        if id(node) in self._open:
            raise _Refused(Mistake("an alias contains itself", self._span(node)))
        self._open.add(id(node))
        value: Any
        if isinstance(node, SequenceNode):
            value = []
            for index, item in enumerate(node.value):
                self._note((*path, index), None, item)
                value.append(self._build(item, (*path, index)))
        else:
            assert isinstance(node, MappingNode)
            value = self._mapping(node, path)
        self._open.remove(id(node))
        return value

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        seen: dict[str, Node] = {}
        merged: list[MappingNode] = []
        value: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self.mistakes.append(Mistake("a key must be a plain string", self._span(key_node)))
                continue
            key = key_node.value
            if key_node.style is None and self._scalar(key_node, report=False) != key:
                message = f"the key `{key}` is not a string" if key else "a key is missing before `:`"
                self.mistakes.append(Mistake(message, self._span(key_node), "write it in quotes" if key else ""))
                continue
            if key in seen:
                first = self._span(seen[key])
                self.mistakes.append(
                    Mistake(
                        f"key `{key}` is given twice",
                        self._span(key_node),
                        "given again here",
                        also=(first, "first given here"),
                    )
                )
                continue
            seen[key] = key_node
            if key == "<<" and key_node.style is None:
                merged += self._merged(value_node)
                continue
            self._note((*path, key), key_node, value_node)
            value[key] = self._build(value_node, (*path, key))
        for other in merged:
            # Its own merge keys are resolved with it; what is written here, or merged before, wins.
            aside = _Builder(Positions(self.source))
            aside.source, aside.column, aside._open, aside._count = (
                self.source,
                self.column,
                self._open,
                self._count,
            )
            inner = aside._build(other, path)
            self._count = aside._count
            self.mistakes += aside.mistakes
            added = {key: inner[key] for key in inner if key not in value}
            value |= added
            self.positions.at |= {at: p for at, p in aside.positions.at.items() if at[len(path)] in added}
        return value

    def _merged(self, node: Node) -> list[MappingNode]:
        parts = node.value if isinstance(node, SequenceNode) else [node]
        wrong = [part for part in parts if not isinstance(part, MappingNode)]
        self.mistakes += [Mistake("`<<` merges mappings only", self._span(part)) for part in wrong]
        return [part for part in parts if isinstance(part, MappingNode)]

    def _scalar(self, node: ScalarNode, *, report: bool = True) -> Any:
        text: str = node.value
        if node.tag == _NULL:
            return None
        if node.tag == _BOOL:
            return text.lower() == "true"
        if node.tag == _INT:
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            # int() refuses thousands of digits with an error of its own; no field takes more than 64 bits.
            number = int(text, base) if len(text) <= 40 else 1 << 64
            if abs(number) >= 1 << 63 and report:
                self.mistakes.append(Mistake("the number does not fit in 64 bits", self._span(node)))
                return 0
            return number
        if node.tag == _FLOAT:
            real = float(text.replace(".inf", "inf").replace(".nan", "nan")) if "." in text[:2] else float(text)
            if not math.isfinite(real) and report:
                self.mistakes.append(Mistake(f"`{text}` is not a finite number", self._span(node)))
                return 0.0
            return real
        return text

    def _with_variables(self, node: ScalarNode) -> Any:
        """A value, with the environment's variables in it; each that is not set is a mistake."""
        value = self._scalar(node)
        if not isinstance(value, str) or "${" not in value:
            return value
        text, wrong = expand_variables(value)
        for part in wrong:
            span = self._span(node)
            line = span.source.lines[span.line] if span.line < len(span.source.lines) else ""
            column = line.find(part.part, span.column)
            if column >= 0:
                span = Span(span.source, span.line, column, len(part.part))
            self.mistakes.append(Mistake(part.message, span, help=part.help))
        if wrong or text == value:
            return text
        if node.style is not None:  # in quotes: a string, whatever it looks like
            return Expanded(text, text)
        tag = BaseResolver.resolve(_Yaml12(""), ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        plain = ScalarNode(tag, text, node.start_mark, node.end_mark)
        return Expanded(text, self._scalar(plain, report=False))

    def _note(self, path: KeyPath, key: Node | None, value: Node) -> None:
        at = self._span(value)
        self.positions.at[path] = Position(self._span(key) if key else at, at, not isinstance(value, ScalarNode))

    def _mark(self, mark: Any, length: int = 1) -> Span:
        return Span(self.source, mark.line, mark.column + (self.column if mark.line == 0 else 0), length)

    def _span(self, node: Node) -> Span:
        start, end = node.start_mark, node.end_mark
        span = self._mark(start)
        line = self.source.lines[span.line] if span.line < len(self.source.lines) else ""
        length = end.column - start.column if start.line == end.line else len(line.rstrip()) - span.column
        return Span(self.source, span.line, span.column, max(length, 1))

    def _syntax(self, error: yaml.MarkedYAMLError) -> Mistake:
        """PyYAML's words, put so that they say what to do."""
        problem, context = error.problem or "", error.context or ""
        mark = error.problem_mark or error.context_mark
        span = self._mark(mark) if mark else None
        opened = self._mark(error.context_mark) if error.context_mark else span
        if "'\\t'" in problem or (span and self._tab_before(span)):
            line = span.source.lines[span.line] if span else ""
            span = Span(self.source, span.line, line.index("\t")) if span and "\t" in line else span
            return Mistake("a tab where YAML wants spaces", span, "use spaces")
        if problem == "mapping values are not allowed here":
            return Mistake("a `:` where no key can stand", span, "put the value in quotes, or mend the indentation")
        if problem == "could not find expected ':'":
            return Mistake("a key without `:`", opened, "write `key: value`")
        if problem.startswith("expected <block end>"):
            before = span.source.lines[span.line][: span.column] if span else ""
            if re.search(r"[:-]\s+(\{[^{}]*\}|\[[^][]*\]|\"[^\"]*\"|'[^']*')\s*$", before):
                return Mistake("text behind a value", span, "put all of the value in one pair of quotes")
            return Mistake("the indentation fits no line above", span)
        if bracket := re.match("expected ',' or '(.)'", problem):
            label = f"opened in line {opened.line + 1}" if opened else ""
            return Mistake(f"`{bracket[1]}` or `,` is missing", span, label)
        if problem.startswith("expected '<document start>'"):
            return Mistake("this belongs to nothing above", span, "check quotes and indentation")
        if "found '<stream end>'" in problem and "flow" in context:
            return Mistake("a bracket is never closed", span)
        if "unexpected end of stream" in problem and "quoted" in context:
            return Mistake("a quote is never closed", opened)
        if problem.startswith("found undefined alias"):
            return Mistake(f"the alias {problem.split()[-1].replace(chr(39), '`')} is not defined", span)
        if isinstance(error, _Bound):
            return Mistake(problem, span)
        if "cannot start any token" in problem:
            character = self.source.lines[span.line][span.column] if span else ""
            return Mistake(f"a value cannot begin with `{character}`", span, "put it in quotes")
        return Mistake(f"this is not YAML: {f'{context}, ' if context else ''}{problem}", span)

    def _tab_before(self, span: Span) -> bool:
        line = self.source.lines[span.line] if span.line < len(self.source.lines) else ""
        return "\t" in line[: len(line) - len(line.lstrip())]


# --- short forms ---


def expand(value: Any, positions: Positions, path: KeyPath = ()) -> Any:
    """Write short forms out, in place: ``method: lora`` becomes ``method: {name: lora}``.

    The new field has the position of the value that stood for it. Returns the expanded value.
    """
    short = SHORT_FORMS.get(tuple("*" if isinstance(key, int) else key for key in path))
    if short and isinstance(value, str):
        value = {short: value}
        if path in positions.at:
            at = positions.at[path].value
            positions.at[(*path, short)] = Position(at, at)
    if isinstance(value, dict):
        for key in value:
            value[key] = expand(value[key], positions, (*path, key))
    elif isinstance(value, list):
        value[:] = [expand(item, positions, (*path, index)) for index, item in enumerate(value)]
    return value


# --- overrides ---

_TRUST: KeyPath = ("model", "trust_remote_code")


def _override(  # wide: what an override changes, and what it is called in reports
    raw: dict[str, Any], option: str, rank: int, positions: Positions, notes: list[str], flag: str
) -> list[Mistake]:
    """Apply one ``dotted.key=value`` to ``raw`` and ``positions``; returns what is wrong inside the value.

    ``notes`` gets what becomes of a method's settings where another method takes its place. ``flag`` is what stands
    before the option where it is shown.
    """
    source = Source("command line" if flag else "overrides", flag + option, rank)
    dotted_key, equals, text = option.partition("=")
    whole = Span(source, 0, len(flag), max(len(dotted_key), 1))
    if not equals or not dotted_key:
        raise _Refused(Mistake("an override is written `key=value`", whole, "for example training.max_steps=20"))
    value_column = len(flag) + len(dotted_key) + 1
    if not text.strip():
        at = Span(source, 0, value_column - 1)
        raise _Refused(Mistake(f"`{dotted_key}` is given no value", at, "write null for none"))
    spans: list[Span] = []
    path: list[str | int] = []
    for match in re.finditer(r"[^.]*(?:\.|$)", dotted_key):
        if match.start() == len(dotted_key) and path and not dotted_key.endswith("."):
            break
        segment = match.group().rstrip(".")
        span = Span(source, 0, len(flag) + match.start(), max(len(segment), 1))
        if not segment:
            raise _Refused(Mistake(f"`{dotted_key}` has an empty part", span))
        spans.append(span)
        path.append(int(segment) if re.fullmatch(r"\d{1,6}", segment) else segment)
    if len(path) > MAX_DEPTH:
        raise _Refused(Mistake(f"nested deeper than {MAX_DEPTH} levels", whole))

    scratch = Positions(source)
    builder = _Builder(scratch, tuple(path))
    value = expand(given := builder.option(source, value_column, spans[-1]), scratch, tuple(path))
    if path[:1] == ["model"]:
        _guard_trust(raw, tuple(path), scratch, whole)

    if path in (["method"], ["method", "name"]) and isinstance(given, str) and given in METHODS:
        raw["method"], told = of_another_method(raw, given)
        notes += told
        place = scratch.at.get(("method", "name")) or scratch.at[tuple(path)]
        positions.at = {
            key: at
            for key, at in positions.at.items()
            if key[:1] != ("method",) or key[1:2] and key[1] in raw["method"]
        }
        positions.at |= {("method",): place, ("method", "name"): place}
        return builder.mistakes

    target: Any = raw
    for depth, key in enumerate(path[:-1]):
        indexed = isinstance(path[depth + 1], int)
        target = _descend(target, key, path[: depth + 1], spans[depth], positions, indexed=indexed)
    key, here = path[-1], tuple(path)
    _require_place(target, key, path[:-1], spans[-1])
    if isinstance(target, list) and key == len(target):
        target.append(value)
    else:
        target[key] = value
    positions.forget(here)
    positions.at |= scratch.at
    return builder.mistakes


def _descend(
    target: Any, key: str | int, path: list[str | int], span: Span, positions: Positions, *, indexed: bool
) -> Any:
    """The block or list under a key; a block that is missing, or null, is made."""
    _require_place(target, key, path[:-1], span)
    missing = key not in target if isinstance(target, dict) else key == len(target)
    if missing or target[key] is None:
        if indexed:
            name = dotted(path)
            raise _Refused(Mistake(f"`{name}` is not a list in the recipe", span, f"give all of it: {name}=[...]"))
        made: dict[str, Any] = {}
        if isinstance(target, list) and missing:
            target.append(made)
        else:
            target[key] = made
        positions.at[tuple(path)] = Position(span, span, True)
        return made
    inner = target[key]
    if not isinstance(inner, (dict, list)):
        raise _Refused(Mistake(f"`{dotted(path)}` has no fields: it is a single value", span))
    return inner


def _require_place(target: Any, key: str | int, parent: list[str | int], span: Span) -> None:
    """Refuse an index into a block, a name into a list, and an index past the end."""
    name = dotted(parent) or "the recipe"
    if isinstance(target, list):
        if not isinstance(key, int):
            raise _Refused(Mistake(f"`{name}` is a list: `{key}` is no index", span, "count from 0"))
        if key > len(target):
            count = f"{len(target)} entr{'y' if len(target) == 1 else 'ies'}"
            raise _Refused(Mistake(f"`{name}` has {count} in the recipe", span, f"at most {len(target)}"))
    elif isinstance(key, int):
        raise _Refused(Mistake(f"`{name}` is not a list in the recipe", span, f"give all of it: {name}=[...]"))


def _guard_trust(raw: dict[str, Any], path: KeyPath, scratch: Positions, whole: Span) -> None:
    """Keep the permission to run a model's code in a file that can be read before it is run."""
    if path[:2] == _TRUST or _TRUST in scratch.at:
        at = scratch.at[_TRUST].key if _TRUST in scratch.at else whole
        where = "on the command line" if whole.column else "by an override"
        raise _Refused(
            Mistake(
                f"`model.trust_remote_code` cannot be set {where}",
                at,
                help="write it in the recipe, where it can be reviewed",
            )
        )
    model = raw.get("model")
    trusted = isinstance(model, dict) and model.get("trust_remote_code") is True
    if trusted and (len(path) == 1 or path[1] in ("id", "revision")):
        raise _Refused(
            Mistake(
                "the recipe trusts the code of the model it names, not of another",
                whole,
                help="change the model in the recipe, beside `trust_remote_code`",
            )
        )


def is_plain_string(text: str) -> bool:
    """Whether a string can stand unquoted after ``key: `` and in a flow list, and be read back as itself."""
    if not text or any(character in ",[]{}#" for character in text):
        return False
    builder = _Builder(Positions(Source("", text)))
    try:
        node = builder._compose(text)
    except _Refused:
        return False
    return isinstance(node, ScalarNode) and node.style is None and builder._scalar(node, report=False) == text
