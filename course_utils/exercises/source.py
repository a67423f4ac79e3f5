"""The text of an answer: as the learner wrote it, and with what it needs to stand alone."""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import linecache
import sys
import textwrap
from types import CodeType, FunctionType, ModuleType
from typing import Any


def functions_of(value: Any) -> list[FunctionType]:
    """The plain functions of a function or class, in the order in which they were written."""
    members = [value]
    if issubclass(type(value), type):
        own = type.__dict__["__dict__"].__get__(value)  # `vars` would ask the answer's metaclass
        members = [m.__func__ if type(m) in _METHODS else m for m in own.values()]
    members = [_unwrapped(m) for m in members if type(m) is FunctionType]
    return sorted(members, key=lambda function: function.__code__.co_firstlineno)


_METHODS = (staticmethod, classmethod)


def _unwrapped(function: FunctionType) -> FunctionType:
    """What the decorators of `function` stand around."""
    try:
        inner = inspect.unwrap(function)
    except ValueError:  # it wraps itself
        return function
    return inner if type(inner) is FunctionType else function


def source_of(value: Any) -> str | None:
    """The definition of a function or class, also where it stands in a notebook's cell.

    `inspect.getsource` does not find classes of notebooks; the cell's text is in `linecache`.
    """
    for function in functions_of(value):
        code, name = function.__code__, getattr(value, "__name__", "")
        lines = linecache.getlines(code.co_filename)
        tree, skipped = _parsed(lines, code.co_firstlineno)
        for node in ast.walk(tree):
            if getattr(node, "name", None) == name and isinstance(node, _DEFINITIONS):
                first = skipped + min([node.lineno, *(d.lineno for d in node.decorator_list)])
                last = skipped + node.end_lineno
                if first <= code.co_firstlineno <= last:
                    found = [line.rstrip("\r\n") for line in lines[first - 1 : last]]
                    return textwrap.dedent("\n".join(found)) + "\n"
    return None


def _parsed(lines: list[str], number: int) -> tuple[ast.Module, int]:
    """The statement at the margin that holds line `number`, and how many lines stand before it.

    To parse all of a catalogue for each answer would take longer than to judge it. Where a string
    or a bracket over several lines reaches the margin, the part cut there is not valid Python, and
    the whole file is parsed; an empty tree where that is not valid either.
    """
    for start, end in (_statement_around(lines, number), (0, len(lines))):
        try:
            return ast.parse("".join(lines[start:end])), start
        except SyntaxError:
            continue
    return ast.Module([], []), 0


def _statement_around(lines: list[str], number: int) -> tuple[int, int]:
    """From its first decorator up to the next statement, told by what stands at the margin."""
    start, decorated = 0, False
    for index, line in enumerate(lines):
        if line[:1] in _NO_STATEMENT:
            continue
        if not decorated:
            if index >= number:
                return start, index
            start = index
        decorated = line[0] == "@"
    return start, len(lines)


_NO_STATEMENT = " \t\f\r\n#)]}"  # what a line begins with that continues or says nothing
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
    for name in global_names(source):
        if name in seen or name not in space:
            continue
        used = space[name]
        home = getattr(used, "__module__", None)
        if isinstance(used, ModuleType):
            imports.append(f"import {used.__name__} as {name}\n")
        elif _is_literal(used):
            definitions[name] = f"{name} = {used!r}\n"
        elif type(used) is float:  # infinite or NaN
            definitions[name] = f"{name} = float('{used}')\n"
        elif isinstance(home, str) and home != "__main__" and _is_there(home, used):
            imports.append(f"from {home} import {used.__name__} as {name}\n")
        elif _collect(used, imports, definitions, seen) and name != used.__name__:
            definitions[name] = f"{name} = {used.__name__}\n"
    definitions[value.__name__] = source
    return True


def global_names(source: str) -> list[str]:
    """The names that a definition looks up outside itself; built-in ones left out.

    Annotations do not count: this file and `mine` leave them unevaluated.
    """
    codes, found, defined = [compile(source, "<answer>", "exec")], [], []
    for code in codes:  # grows: the code of each function and class inside
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        steps = list(dis.get_instructions(code))
        defined.append({step.argval for step in steps if step.opname == "STORE_NAME"})
        for step in steps:
            inside = step.opname != "LOAD_GLOBAL" and step.argval in defined[-1]
            if step.opname in _LOOK_UPS and not inside:
                found.append(step.argval)
    known = defined[0] | set(dir(builtins))
    return [name for name in dict.fromkeys(found) if name not in known]


_LOOK_UPS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")


def _is_literal(value: Any) -> bool:
    try:
        return type(value) in _LITERALS and bool(ast.literal_eval(repr(value)) == value)
    except Exception:
        return False


_LITERALS = (int, float, complex, str, bytes, bool, type(None), tuple, list, dict, set)


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
