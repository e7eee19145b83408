"""Reading configuration files: safe YAML, ``_base_`` inheritance, ``--cfg-options``.

The files are a subset of YAML 1.2. PyYAML's own loaders are not used unchanged: the unsafe ones run
code that a file names; the safe one reads ``4e-3`` as a string, ``on`` as a boolean, and silently
takes the last of two equal keys.

How files combine:

- ``_base_`` (a file or a list of files, relative to the file that names them; where there is none,
  a configuration of this project, by its name or ``configs/...``) is read first; later bases
  override earlier ones, and the file itself overrides its bases.
- Mappings merge key by key. Everything else is replaced: lists as a whole, and ``null`` replaces a
  mapping.
- A mapping with ``_delete_: true`` replaces the inherited one.
- ``--cfg-options a.b=value`` is one more file on top, ``{a: {b: value}}``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..errors import did_you_mean
from .names import shipped
from .tree import OPTIONS, ConfigError, Entry, Origin, join, merge, show

BASE = "_base_"
DELETE = "_delete_"
DEPTH = 20  # of inheritance
LARGEST = 2**20  # bytes of a file
NESTING = 50  # of {} and []

_TAG = "tag:yaml.org,2002:"
# Plain scalars that are not strings, tried in this order. The dumper of resolved configurations
# uses the same table, so that it quotes exactly the strings that would be read as something else.
SCALARS = [
    (_TAG + "null", re.compile(r"(?:~|null|)\Z")),
    (_TAG + "bool", re.compile(r"(?:true|True|false|False)\Z")),
    (_TAG + "int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z")),
    (
        _TAG + "float",
        re.compile(
            r"(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)\Z"
        ),
    ),
]
_PLAIN_TAGS = {tag for tag, _ in SCALARS} | {_TAG + "str", _TAG + "map", _TAG + "seq"}


class _Loader(yaml.SafeLoader):
    # Without aliases a file can neither contain itself nor grow without bound when it is expanded.
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            message = f"anchors and aliases (&, *) are not supported; share settings through {BASE}"
            raise yaml.MarkedYAMLError(problem=message, problem_mark=mark)
        return super().compose_node(parent, index)

    # The scanner looks at every open bracket for every token: deep nesting would take hours.
    def fetch_flow_collection_start(self, token: type) -> None:
        if self.flow_level >= NESTING:
            message = f"more than {NESTING} brackets within one another"
            raise yaml.MarkedYAMLError(problem=message, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, None)


class _Reader:
    """One YAML text turned into a tree of entries; its problems are collected, not raised."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.is_file = source != OPTIONS
        self.problems: list[str] = []

    def read(self, text: str, key: str = "") -> Entry:
        """The tree of ``text``, which is the value of ``key``; an empty file is an empty mapping.

        Raises:
            ConfigError: the text is not YAML, or uses refused features.
        """
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            if not self.is_file and (node is None or node.end_mark.index < len(text.rstrip())):
                # A "#" is part of the value: options have no comments.
                return Entry(text.strip(), Origin(self.source))
            entry = (
                Entry({}, Origin(self.source)) if node is None else self._entry(loader, node, key)
            )
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            quoted = f"{key} = {text}: " if key else ""
            raise ConfigError(f"{self._origin(mark)}: {quoted}not valid: {reason}") from None
        if self.problems:
            raise ConfigError(*self.problems)
        return entry

    def _origin(self, mark: yaml.Mark | None) -> Origin:
        return Origin(self.source, mark.line + 1 if self.is_file and mark is not None else None)

    def _problem(self, node: yaml.Node, key: str, message: str) -> None:
        where = self._origin(node.start_mark)
        self.problems.append(f"{where}: {key}: {message}" if key else f"{where}: {message}")

    def _entry(self, loader: _Loader, node: yaml.Node, key: str) -> Entry:
        origin = self._origin(node.start_mark)
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace(_TAG, "!!")
            expected = "expected a plain value; tags that construct objects are refused"
            self._problem(node, key, f"{tag}: {expected}")
            return Entry(None, origin)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, key)
        if isinstance(node, yaml.SequenceNode):
            return Entry([self._entry(loader, item, key).plain() for item in node.value], origin)
        try:
            value = loader.construct_object(node)
            if isinstance(value, str):  # JSON escapes characters beyond 16 bits in two halves
                value = value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
            return Entry(value, origin)
        except (ValueError, KeyError, IndexError):  # an explicit tag that the text does not fit
            self._problem(node, key, f"{node.value!r} is no {node.tag.replace(_TAG, '!!')}")
            return Entry(None, origin)

    def _mapping(self, loader: _Loader, node: yaml.MappingNode, key: str) -> Entry:
        children: dict[str, Entry] = {}
        lines: dict[str, int] = {}
        complete = False
        for name_node, value_node in node.value:
            name: str = name_node.value
            child_key = join(key, name)
            if name_node.tag != _TAG + "str":
                self._problem(name_node, child_key, "keys are strings: put this one in quotes")
                continue
            if name in lines:
                message = f"set twice in one mapping, first on line {lines[name]}"
                self._problem(name_node, child_key, message)
                continue
            lines[name] = name_node.start_mark.line + 1
            child = self._entry(loader, value_node, child_key)
            if name == BASE and (key or not self.is_file):
                self._problem(name_node, child_key, f"{BASE} belongs at the top of a file")
            elif name == DELETE:
                complete = True
                if child.value is not True:
                    self._problem(
                        name_node, child_key, f"expected true, found {show(child.plain())}"
                    )
            else:
                # Report the line of the key: a nested value starts a line later.
                children[name] = Entry(
                    child.value, self._origin(name_node.start_mark), child.complete
                )
        return Entry(children, self._origin(node.start_mark), complete)


def read_config(path: str | os.PathLike[str], options: Iterable[str] = ()) -> Entry:
    """The merged tree of a file, its bases and the options; nothing in it is checked yet.

    Args:
        path: the YAML file.
        options: ``a.b=value`` strings, the value in YAML's flow style; later ones override.

    Raises:
        ConfigError: a file is missing or not valid, its inheritance goes in a circle, or an option
            cannot be read.
    """
    tree = _read_file(os.fspath(path), named_by=None, chain=(), known={})
    problems: list[str] = []
    for option in options:
        try:
            tree = merge(tree, read_option(option))
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(*problems)
    return tree


def parse_config(text: str, source: str) -> Entry:
    """The tree of a resolved configuration's text, without ``_base_``; nothing in it is checked.

    Args:
        text: YAML, as :func:`kw.config.to_yaml` writes it.
        source: its name in error messages.

    Raises:
        ConfigError: it is no YAML mapping.
    """
    tree = _Reader(source).read(text)
    if not isinstance(tree.value, dict) or BASE in tree.value:
        raise ConfigError(f"{source}: expected a mapping of settings, without {BASE}")
    return tree


def _read_file(
    path: str, named_by: Origin | None, chain: tuple[str, ...], known: dict[str, Entry]
) -> Entry:
    """A file merged with its bases; ``known`` are bases that were read already, by real path."""
    where = f"{named_by}: {BASE} = {path!r}" if named_by else path
    if "\0" in path:
        raise ConfigError(f"{where!r}: expected the name of a file, found one with a zero byte")
    steps = [os.path.realpath(step) for step in chain]
    if os.path.realpath(path) in steps:
        raise ConfigError(f"{where}: inheritance goes in a circle: {' -> '.join((*chain, path))}")
    if len(chain) > DEPTH:
        raise ConfigError(f"{where}: more than {DEPTH} files inherit from one another")
    if chain and os.path.realpath(path) in known:
        return known[os.path.realpath(path)]
    tree = _Reader(path).read(_read_text(path, where))
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {show(tree.value)}")
    own = dict(tree.value)
    merged = Entry({}, Origin(path))
    if BASE in own:
        base = own.pop(BASE)
        for name in _base_names(base):
            base_path = os.path.normpath(os.path.join(os.path.dirname(path), name))
            if not os.path.isfile(base_path) and (ours := shipped(name)):
                base_path = str(ours)
            merged = merge(merged, _read_file(base_path, base.origin, (*chain, path), known))
    merged = merge(merged, Entry(own, Origin(path), tree.complete))
    known[os.path.realpath(path)] = merged
    return merged


def _base_names(base: Entry) -> list[str]:
    value = base.plain()
    names: list[Any] = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        expected = "expected a file name or a list of file names"
        raise ConfigError(f"{base.origin}: {BASE} = {show(value)}: {expected}")
    return names


def _read_text(path: str, where: str) -> str:
    if path.endswith(".py"):
        raise ConfigError(
            f"{where}: Python configurations are for detectors; a classifier's is a .yaml file"
        )
    try:
        # Refuse devices and pipes, which may be endless, and checkpoints of gigabytes.
        if os.path.exists(path) and not os.path.isdir(path):
            if not os.path.isfile(path):
                raise ConfigError(f"{where}: expected a YAML file, found one that is no file")
            if (size := os.path.getsize(path)) > LARGEST:
                raise ConfigError(f"{where}: expected a YAML file, found one of {size:,} bytes")
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = Path(path).parent
        names = [str(f) for f in folder.glob("*.y*ml")] if folder.is_dir() else []
        found = "" if folder.is_dir() else f" (nor a folder {folder})"
        hint = did_you_mean(path, names)
        raise ConfigError(f"{where}: no such file: {path}{found}{hint}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: expected a YAML file, found one that is not text") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None


def read_option(option: str) -> Entry:
    """The tree of one ``a.b=value``.

    Raises:
        ConfigError: it has no key or no value, or the value is no YAML.
    """
    key, equals, text = option.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{OPTIONS}: {option!r}: expected KEY=VALUE, e.g. optimizer.lr=0.1")
    if BASE in names or DELETE in names:
        raise ConfigError(f"{OPTIONS}: {option!r}: {BASE} and {DELETE} belong in files")
    key = ".".join(names)
    if not text.strip():
        raise ConfigError(f"{OPTIONS}: {key}: no value after '='; for none write {key}=null")
    entry = _Reader(OPTIONS).read(text, key)
    for name in reversed(names):
        entry = Entry({name: entry}, entry.origin)
    return entry
