"""Run specs as text: YAML by the core rules of YAML 1.2, written so that any YAML reads it.

PyYAML reads scalars by YAML 1.1, where `1e-4` is a string, `on` a boolean, `010` eight and `1:30`
ninety. Here plain scalars follow the core schema of YAML 1.2: numbers are what they look like
(`1e-4`, `010` is ten), `on`, `off`, `yes`, `no` and dates are strings. JSON is YAML and reads the
same. What a spec has no use for is refused instead of guessed at: aliases (which also lets a few
bytes stand for gigabytes), tags, a second document, a key given twice.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from lrpilot.core._errors import InvalidSpec, Violation
from lrpilot.core._spec import RunSpec, parse_spec

MAX_BYTES = 256 * 1024
"""A document with more UTF-8 bytes is refused unread."""

MAX_DEPTH = 32
"""A document with values that lie deeper is refused; those of a spec lie at most 6 deep."""

# The C parser is the same one some thirty times faster; not every platform has it.
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WRITER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_INFINITE = r"[-+]?\.(?:inf|Inf|INF)"
_NAN = r"\.(?:nan|NaN|NAN)"
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_LONGEST_NUMBER = 400
"""Python refuses to read integers of thousands of digits; no number of a spec comes near."""


def read_spec(text: str) -> RunSpec:
    """Return the run spec that a YAML document describes; InvalidSpec names all that is wrong."""
    return parse_spec(load_document(text))


def load_document(text: str) -> dict[str, Any]:
    """Return the mapping that a YAML document holds, as plain data; keys are always strings.

    Raises InvalidSpec: for a syntax error with one violation that names line and column (both
    count from 1), for keys given twice with one for each.

    >>> load_document("peak: 1e-4")
    {'peak': 0.0001}
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        _refuse("", f"{size:,} bytes", f"at most {MAX_BYTES:,} bytes")
    text = text.removeprefix("\ufeff")
    if text.lstrip()[:1] == "{":
        try:
            return _load_json(text)
        except (ValueError, RecursionError):
            # A flow mapping of YAML begins alike, and the reader of YAML says what is wrong where.
            pass
    return _Reader(text).document()


def dump_document(mapping: Mapping[str, Any]) -> str:
    """Return plain data as a YAML document that readers of YAML 1.1 and 1.2 read alike.

    >>> print(dump_document({"name": "010", "peak": 1e-4}), end="")
    name: '010'
    peak: 0.0001
    """
    written: str = yaml.dump(
        mapping, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=100
    )
    return written


class _Writer(_WRITER):  # type: ignore[misc]
    """Writes plain data; strings that a version of YAML takes for something else get quotes."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        # The reader takes none.
        return True


_Writer.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"^(?:{_INT}|{_FLOAT}|{_INFINITE}|{_NAN})$"),
    list("-+.0123456789"),
)
_Writer.add_multi_representer(Mapping, lambda writer, data: writer.represent_dict(dict(data)))
_Writer.add_representer(tuple, lambda writer, data: writer.represent_list(list(data)))


def _load_json(text: str) -> dict[str, Any]:
    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            keys = [key for key, _ in pairs]
            raise InvalidSpec(
                "the document cannot be read",
                [
                    Violation(key, f"{keys.count(key)} values", "one value")
                    for key in mapping
                    if keys.count(key) > 1
                ],
            )
        return mapping

    # NaN and Infinity are no JSON and, in YAML, strings.
    loaded: dict[str, Any] = json.loads(text, object_pairs_hook=fields, parse_constant=str)
    return loaded


class _Reader:
    """Builds plain data from the events of one document."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._repeats: list[Violation] = []

    def document(self) -> dict[str, Any]:
        try:
            return self._document(yaml.parse(self._text, Loader=_PARSER))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = ", ".join(part for part in (error.context, error.problem) if part)
            _refuse(_place(mark) if mark is not None else "", what, "valid YAML")
        except (yaml.reader.ReaderError, UnicodeEncodeError):
            bad = yaml.reader.Reader.NON_PRINTABLE.search(self._text)
            before = self._text[: bad.start() if bad is not None else 0]
            place = (
                f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"
            )
            what = repr(bad.group()) if bad is not None else "a lone surrogate"
            _refuse(place, what, "characters that YAML takes")

    def _document(self, events: Iterator[Event]) -> dict[str, Any]:
        next(events)
        if not isinstance(next(events), DocumentStartEvent):
            _refuse("", "an empty document", "a mapping of fields")
        root = next(events)
        value = self._value(root, events, ())
        next(events)
        after = next(events)
        if not isinstance(after, StreamEndEvent):
            _refuse(_place(after.start_mark), "a second document", "one document")
        if not isinstance(value, dict):
            got = "a list" if isinstance(value, list) else f"{value!r:.80}"
            _refuse("", got, "a mapping of fields")
        if self._repeats:
            raise InvalidSpec("the document cannot be read", self._repeats)
        return value

    def _value(self, event: Event, events: Iterator[Event], path: tuple[str, ...]) -> Any:
        place = _place(event.start_mark)
        if isinstance(event, AliasEvent):
            _refuse(place, f"the alias *{event.anchor}", "no aliases: write the value out")
        tag: str | None = event.tag  # type: ignore[attr-defined]
        if tag is not None:
            _refuse(place, f"the tag {tag}", "no tags")
        if isinstance(event, ScalarEvent):
            return _plain(event.value) if event.implicit[0] else event.value
        if len(path) >= MAX_DEPTH:
            _refuse(place, f"more than {MAX_DEPTH} levels", f"at most {MAX_DEPTH}")
        if isinstance(event, SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := next(events), SequenceEndEvent):
                items.append(self._value(item, events, (*path, str(len(items)))))
            return items
        return self._mapping(events, path)

    def _mapping(self, events: Iterator[Event], path: tuple[str, ...]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(key := next(events), MappingEndEvent):
            if not isinstance(key, ScalarEvent):
                _refuse(_place(key.start_mark), "a key that is no scalar", "names as keys")
            name, line = key.value, _line(key.start_mark)
            fields[name] = self._value(next(events), events, (*path, name))
            if name in lines:
                got = f"a second value at line {line}"
                allowed = f"one value (the first is at line {lines[name]})"
                self._repeats.append(Violation(".".join((*path, name)), got, allowed))
            lines.setdefault(name, line)
        return fields


def _plain(text: str) -> Any:
    """Return what a scalar without quotes means in the core schema of YAML 1.2."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _LONGEST_NUMBER:
        return text
    if re.fullmatch(_INT, text):
        return int(text, 0 if text.startswith(("0o", "0x")) else 10)
    if re.fullmatch(_FLOAT, text):
        return float(text)
    if re.fullmatch(rf"{_INFINITE}|{_NAN}", text):
        return float(text.replace(".", ""))
    return text


def _line(mark: Any) -> int:
    number: int = mark.line + 1
    return number


def _place(mark: Any) -> str:
    return f"line {_line(mark)}, column {mark.column + 1}"


def _refuse(field: str, got: str, allowed: str) -> NoReturn:
    raise InvalidSpec("the document cannot be read", [Violation(field, got, allowed)])
