"""Real text and code that every Python installation carries: the laptop recipe's reading matter.

The standard library's modules give functions with docstrings, `pydoc_data.topics` gives the
language reference, scikit-learn gives the descriptions of its data sets. Modules and topics are
split into train and val by a hash of their names, so held-out text comes from other documents than
training text.

Reads files only; nothing is imported but `pydoc_data.topics`. About three seconds, once a process.
"""

import ast
import hashlib
import importlib.util
import re
import sysconfig
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PACKAGES = (
    "asyncio",
    "collections",
    "concurrent/futures",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "tomllib",
    "unittest",
    "urllib",
    "wsgiref",
    "xml/dom",
    "xml/etree",
    "xmlrpc",
    "zoneinfo",
)
"""Packages of the standard library that are read besides its top-level modules."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(])")


@dataclass(frozen=True)
class Function:
    """A function or method with a docstring: names, dedented source, source without docstring."""

    module: str
    name: str
    source: str
    body: str
    signature: str
    summary: str


def installed_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; the laptop's data is built from it")
    return Path(next(iter(spec.submodule_search_locations)))


def split_of(name: str) -> str:
    """The split a document belongs to: one in eight is held out."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return "val" if digest[0] < 32 else "train"


@lru_cache(maxsize=1)
def modules() -> tuple[tuple[str, str], ...]:
    """Names and sources of the standard library's public modules, sorted by name."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = list(library.glob("*.py"))
    for package in PACKAGES:
        files += (library / package).glob("*.py")
    named = {
        ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
        if not file.name.startswith("_") or file.name == "__init__.py"
    }
    return tuple((name, named[name].read_text(encoding="utf-8")) for name in sorted(named))


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return _SENTENCE.split(paragraph)[0]


def _function(module: str, owner: str, node: ast.FunctionDef, lines: list[str]) -> Function | None:
    doc = ast.get_docstring(node)
    if not doc or len(node.body) < 2 or node.end_lineno is None:
        return None
    first, end = node.body[0], node.end_lineno
    start = min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 1
    source = textwrap.dedent("\n".join(lines[start:end]))
    without = lines[start : first.lineno - 1] + lines[first.end_lineno : end]
    signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : first.lineno - 1])).strip()
    return Function(
        module=module,
        name=owner + node.name,
        source=source,
        body=textwrap.dedent("\n".join(without)).strip(),
        signature=signature,
        summary=first_sentence(doc),
    )


@lru_cache(maxsize=2)
def functions(split: str) -> tuple[Function, ...]:
    """Documented functions and methods of the split's modules, in order of module and line."""
    found: list[Function] = []
    for module, source in modules():
        if split_of(module) != split:
            continue
        lines = source.splitlines()
        for node in ast.parse(source).body:
            owner, members = "", [node]
            if isinstance(node, ast.ClassDef):
                owner, members = node.name + ".", node.body
            for member in members:
                if isinstance(member, ast.FunctionDef):
                    function = _function(module, owner, member, lines)
                    if function is not None and 12 <= len(function.summary) <= 160:
                        found.append(function)
    return tuple(found)


@lru_cache(maxsize=2)
def topics(split: str) -> tuple[tuple[str, str], ...]:
    """Titles and texts of the split's language reference chapters and data set descriptions."""
    from pydoc_data.topics import topics as reference

    found = [(name, text.strip()) for name, text in sorted(reference.items())]
    for file in sorted((installed_folder("sklearn") / "datasets" / "descr").glob("*.rst")):
        found.append((file.stem.replace("_", " ") + " data set", file.read_text("utf-8").strip()))
    return tuple((name, text) for name, text in found if split_of(name) == split)


def _prose(text: str) -> list[str]:
    """The paragraphs of a text that are sentences rather than code, tables or headings."""
    found = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(text)):
        line = " ".join(block.split())
        letters = sum(character.isalpha() or character == " " for character in line)
        if re.match(r"[A-Z]", line) and line.endswith((".", ":")) and letters > 0.85 * len(line):
            found.append(line)
    return found


@lru_cache(maxsize=2)
def paragraphs(split: str) -> tuple[str, ...]:
    """Prose paragraphs of 60 to 600 characters from the split's topics and module docstrings."""
    blocks: list[str] = []
    for _, text in topics(split):
        blocks += _prose(text)
    for module, source in modules():
        if split_of(module) == split:
            blocks += _prose(ast.get_docstring(ast.parse(source)) or "")
    unique = dict.fromkeys(block for block in blocks if 60 <= len(block) <= 600)
    # Modules repeat each other's sentences; what is held out is not trained on.
    known = set(paragraphs("train")) if split == "val" else set()
    return tuple(block for block in unique if block not in known)


@lru_cache(maxsize=2)
def words(split: str) -> tuple[str, ...]:
    """Distinct words of 3 to 9 letters of the split's prose, sorted."""
    found = {word for text in paragraphs(split) for word in re.findall(r"\b[A-Za-z]{3,9}\b", text)}
    return tuple(sorted(found))


@lru_cache(maxsize=2)
def identifiers(split: str) -> tuple[str, ...]:
    """Distinct function names of 4 to 16 characters of the split's modules, sorted."""
    names = {function.name.split(".")[-1] for function in functions(split)}
    return tuple(sorted(name for name in names if 4 <= len(name) <= 16))
