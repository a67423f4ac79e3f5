"""The text of an answer: as the learner wrote it, and with what it needs to stand alone."""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import sys
import textwrap
from types import FunctionType, ModuleType
from typing import Any


def functions_of(value: Any) -> list[FunctionType]:
    """The plain functions of a function or class, in the order in which they were written."""
    members = [value]
    if issubclass(type(value), type):
        members = [getattr(member, "__func__", member) for member in vars(value).values()]
    members = [inspect.unwrap(m) for m in members if type(m) is FunctionType]
    return sorted(members, key=lambda function: function.__code__.co_firstlineno)


def source_of(value: Any) -> str | None:
    """The definition of a function or class, also where it stands in a notebook's cell.

    `inspect.getsource` does not find classes of notebooks; the cell's text is in `linecache`.
    """
    for function in functions_of(value):
        code, name = function.__code__, getattr(value, "__name__", "")
        text = "".join(linecache.getlines(code.co_filename))
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if getattr(node, "name", None) == name and isinstance(node, _DEFINITIONS):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first <= code.co_firstlineno <= node.end_lineno:
                    lines = text.splitlines()[first - 1 : node.end_lineno]
                    return textwrap.dedent("\n".join(lines)) + "\n"
    return None


_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def self_contained(value: Any) -> str | None:
    """The definition behind the imports, constants and helpers of the notebook that it uses.

    Returns None where the source is not at hand.
    """
    imports: list[str] = []
    definitions: dict[str, str] = {}
    if not _collect(value, imports, definitions, set()):
        return None
    return "".join(sorted(set(imports))) + "\n\n" + "\n\n".join(definitions.values())


def _collect(value: Any, imports: list[str], definitions: dict[str, str], seen: set[str]) -> bool:
    source = source_of(value)
    if source is None:
        return False
    seen.add(value.__name__)
    space = functions_of(value)[0].__globals__
    names = [node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    for name in dict.fromkeys(names):
        if name in seen or name not in space or hasattr(builtins, name):
            continue
        used = space[name]
        home = getattr(used, "__module__", None)
        if isinstance(used, ModuleType):
            imports.append(f"import {used.__name__} as {name}\n")
        elif isinstance(used, (int, float, str, bytes, bool, type(None))):
            definitions[name] = f"{name} = {used!r}\n"
        elif isinstance(home, str) and home != "__main__" and _is_there(home, used):
            imports.append(f"from {home} import {used.__name__} as {name}\n")
        else:
            _collect(used, imports, definitions, seen)
    definitions[value.__name__] = source
    return True


def _is_there(module: str, value: Any) -> bool:
    name = getattr(value, "__name__", "")
    return name.isidentifier() and getattr(sys.modules.get(module), name, None) is value


def stub_of(reference: Any) -> str:
    """The reference without its bodies: what a learner starts from."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(reference)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            has_text = ast.get_docstring(node) is not None
            node.body = (
                node.body[: 1 if has_text else 0] + ast.parse("raise NotImplementedError").body
            )
    return ast.unparse(tree) + "\n"
