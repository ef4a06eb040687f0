"""The text that the demo model learns from: what every Python carries about itself.

Docstrings (`ast`, and `__doc__` for modules written in C), comments (`tokenize`) and the
language reference in `pydoc_data`. The same interpreter always gives the same corpus.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import io
import re
import sys
import sysconfig
import tokenize
import warnings
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedupe import NearDuplicates

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

# The comments of `encodings` are mapping tables; the others hold no text of the standard library.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "lib-dynload", "__pycache__"}
HELD_OUT_PERCENT = 6
TOPICS_UNIT = "pydoc_data"  # refers to every module, so it can only be trained on
SEPARATOR = "\x00"  # one byte after each document, wherever text is measured in bytes

_TOOL_COMMENT = re.compile(r"#\s*(!|-\*-|type:|noqa|pragma|fmt:|pylint|mypy)")
_RULE = re.compile(r"([-=*#~_+.^])\1{7,}")
_NAMED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One docstring, comment block or topic."""

    unit: str  # what it is held out together with: a top-level module and its tests
    name: str | None  # dotted name of what the text describes; comments have none
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents in module order, split so that no module has text on both sides."""

    train: list[Document]
    held_out: list[Document]


def collect_corpus() -> Corpus:
    """Read this interpreter's standard library, drop near duplicates, and split by module."""
    documents = [*_source_documents(), *documents_without_source()]
    documents = [document for document in documents if _is_prose(document.text)]
    # Training text goes first: a paragraph that both sides have then leaves the held-out side.
    seen = NearDuplicates()
    return Corpus(
        train=_drop_duplicates((d for d in documents if not is_held_out(d.unit)), seen),
        held_out=_drop_duplicates((d for d in documents if is_held_out(d.unit)), seen),
    )


def documents_of(units: Collection[str]) -> list[Document]:
    """Read a few modules with their tests, and no others; near duplicates are not dropped."""
    return [document for document in _source_documents(units) if _is_prose(document.text)]


def documents_without_source() -> list[Document]:
    """Read what stands in no module's own source: modules written in C, and the topics."""
    with warnings.catch_warnings(action="ignore"):  # of modules that a later Python will not have
        return [*_extension_documents(), *_topic_documents()]


def source_files() -> Iterator[tuple[Path, str]]:
    """Yield the files that documents are read from, each with its module's dotted name."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib).with_suffix("")
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and relative.parts[0] != TOPICS_UNIT:
            yield path, ".".join(relative.parts).removesuffix(".__init__")


def is_held_out(unit: str) -> bool:
    """Decide the side of a module by its name alone, so that it never changes sides."""
    digest = hashlib.sha256(unit.encode()).digest()
    return unit != TOPICS_UNIT and int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def join_documents(documents: Iterable[Document]) -> str:
    """Return the text as every compared method gets it: a separator after each document."""
    return "".join(document.text + SEPARATOR for document in documents)


def _drop_duplicates(documents: Iterable[Document], seen: NearDuplicates) -> list[Document]:
    kept = ((document, seen.keep_new(document.text)) for document in documents)
    return [Document(unit=d.unit, name=d.name, text=text) for d, text in kept if text]


def _source_documents(units: Collection[str] | None = None) -> Iterator[Document]:
    for path, module in source_files():
        if units is None or unit_of(module) in units:
            yield from _file_documents(path, module)


def _file_documents(path: Path, module: str) -> list[Document]:
    source = path.read_bytes()
    try:
        with warnings.catch_warnings(action="ignore"):
            found = [*_docstrings(ast.parse(source), module), *_comments(source)]
    except (SyntaxError, ValueError, tokenize.TokenError):
        return []  # the test package holds files that are broken on purpose
    unit = unit_of(module)
    found.sort(key=lambda item: item[0])
    return [Document(unit=unit, name=name, text=_tidy(text)) for _, name, text in found]


def unit_of(module: str) -> str:
    """Name the held-out unit: `test.test_io`, `_pyio` and `_io` all go with `io`."""
    parts = module.split(".")
    name = parts[1] if parts[0] == "test" and len(parts) > 1 else parts[0]
    return re.sub(r"^(test_|_py|_)+", "", name) or name


def _docstrings(tree: ast.AST, scope: str) -> Iterator[tuple[int, str | None, str]]:
    if isinstance(tree, _NAMED) and (text := ast.get_docstring(tree)):
        yield tree.body[0].lineno, scope, text
    for child in ast.iter_child_nodes(tree):
        name = getattr(child, "name", None) if isinstance(child, _NAMED) else None
        yield from _docstrings(child, f"{scope}.{name}" if name else scope)


def _comments(source: bytes) -> Iterator[tuple[int, None, str]]:
    """Yield blocks of whole-line comments that follow each other at one indentation."""
    block: list[str] = []
    start, end, column = 0, -1, -1
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
            continue
        line, indent = token.start
        if (line, indent) != (end + 1, column):
            yield start, None, "\n".join(block)
            block, start, column = [], line, indent
        end = line
        if not _TOOL_COMMENT.match(token.string):
            block.append(token.string.lstrip("#").removeprefix(" "))
    yield start, None, "\n".join(block)


def _extension_documents() -> Iterator[Document]:
    for module_name in sorted(sys.stdlib_module_names):
        spec = find_spec(module_name) if not module_name.startswith("_test") else None
        if spec and (spec.origin == "built-in" or isinstance(spec.loader, ExtensionFileLoader)):
            module = importlib.import_module(module_name)
            yield from _member_documents(module, module_name, unit_of(module_name))


def _member_documents(owner: Any, scope: str, unit: str) -> Iterator[Document]:
    if isinstance(owner.__doc__, str):
        yield Document(unit=unit, name=scope, text=_tidy(inspect.cleandoc(owner.__doc__)))
    for name, member in sorted(vars(owner).items()):
        if name.startswith("__") or not hasattr(member, "__doc__"):
            continue
        if isinstance(member, type) and member.__module__ == scope:
            yield from _member_documents(member, f"{scope}.{name}", unit)
        elif callable(member) and isinstance(member.__doc__, str):
            text = _tidy(inspect.cleandoc(member.__doc__))
            yield Document(unit=unit, name=f"{scope}.{name}", text=text)


def _topic_documents() -> Iterator[Document]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(unit=TOPICS_UNIT, name=name, text=_tidy(text))


def _tidy(text: str) -> str:
    lines = (line.rstrip() for line in text.expandtabs().splitlines())
    return _RULE.sub(lambda rule: rule[1] * 8, "\n".join(lines).strip("\n"))


def _is_prose(text: str) -> bool:
    """Tell sentences from tables, commented-out code and characters other than Latin."""
    if len(text.split()) < 4 or SEPARATOR in text:
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    return letters >= 0.75 * len(text) and len(text.encode(errors="replace")) < 1.1 * len(text)


def main() -> None:
    """Print how large the corpus is."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    corpus = collect_corpus()
    for side, documents in (("train", corpus.train), ("held out", corpus.held_out)):
        num_bytes = len(join_documents(documents).encode())
        units = sorted({document.unit for document in documents})
        print(f"{side}: {num_bytes:,} bytes, {len(documents):,} documents, {len(units)} modules")
    print("held out:", ", ".join(units))


if __name__ == "__main__":
    main()
