"""python -m course_utils COMMAND: what make calls, and what works where make is missing."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course_utils", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    command("env", "create or mend the environment in .venv (needs only Python)")
    for name, text in (
        ("lab", "open JupyterLab on chapter 1; further arguments go to JupyterLab"),
        ("test", "lint and run all tests; further arguments go to pytest"),
        ("bench", "measure what the chapters quote; takes minutes"),
    ):
        command(name, text)
    solve = command("solve", "write a notebook's solved form")
    solve.add_argument("notebook")
    solve.add_argument("-o", "--output", required=True)
    command("status", "show which exercises are passed")
    grade = command("grade", "run a learner's notebook and list the state of its exercises")
    grade.add_argument("notebook")
    new = command("new-exercise", "print the pieces of a new exercise, ready to fill in")
    new.add_argument("chapter", help="the chapter's file name: autograd, mlp, …")
    new.add_argument("name", help="the function or class to build, as in the notebook")

    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in ("lab", "test", "bench"):
        parser.error(f"{arguments.command} does not take {' '.join(rest)}")
    if arguments.command in ("env", "lab", "test", "bench"):
        from . import bootstrap

        if arguments.command == "env":
            return bootstrap.env()
        return getattr(bootstrap, arguments.command)(rest)
    return globals()[f"_{arguments.command.replace('-', '_')}"](arguments)


def _solve(arguments: argparse.Namespace) -> int:
    from .notebooks import NotebookError, solve

    try:
        solve(arguments.notebook, arguments.output)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Solved form of {arguments.notebook} written to {arguments.output}.")
    return 0


def _status(_: argparse.Namespace) -> int:
    from .learner import status

    status()
    return 0


def _grade(arguments: argparse.Namespace) -> int:
    from .notebooks import NotebookError, grade

    try:
        table = grade(arguments.notebook)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 2
    for slug, state in table.items():
        print(f"{state:<14} {slug}")
    passed = sum(state == "passed" for state in table.values())
    print(f"{passed} of {len(table)} passed")
    return 0


def _new_exercise(arguments: argparse.Namespace) -> int:
    from .exercises.scaffold import scaffold

    if not arguments.name.isidentifier():
        print(f"{arguments.name!r} is no name for a function or class.", file=sys.stderr)
        return 2
    print(scaffold(arguments.chapter, arguments.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
