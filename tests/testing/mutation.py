"""Changes to single statements of the runtime, made in place while a program runs, and taken back after it.

`applied` edits one node of a syntax tree, and `rewritten` the source text of one function.

A mutation is an edit of a module's syntax tree. The edited module is compiled, and the code object of the one function that
holds the edit is put into the live function. So everybody who imported that function runs the edited code, nothing is
reloaded, nothing is written to disk, and a mutation costs some milliseconds.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = [
    "REMOVED", "Mutation", "Place", "StaleEditError", "applied", "deletions", "instrumented", "places", "rewritten",
    "source_of",
]  # fmt: skip

#: What a mutation says that takes a statement out.
REMOVED: Final = "removed"

Function = ast.FunctionDef | ast.AsyncFunctionDef


class StaleEditError(LookupError):
    """An edit names a function or a text that the runtime no longer has."""


@dataclass(frozen=True)
class Place:
    """A node of a module's tree.

    Attributes:
        module: the module.
        name: of the function that it stands in, inner functions included.
        outer: name and first line of the outermost function around it, whose code object holds it.
        line: its line.
        text: its source, on one line.
        index: the how manieth node of the tree it is.
        statement: likewise, the statement that it is or stands in.
    """

    module: types.ModuleType
    name: str
    outer: tuple[str, int]
    line: int
    text: str
    index: int
    statement: int

    @property
    def file(self) -> str:
        """The module's file, as one writes it."""
        return self.module.__name__.replace(".", "/") + ".py"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.name}: {self.text}"


@dataclass(frozen=True)
class Mutation:
    """One edit.

    Attributes:
        place: the node that is edited.
        what: the edit, in words.
        edit: from the node to what takes its place.
    """

    place: Place
    what: str
    edit: Callable[[ast.AST], ast.AST] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


@functools.cache
def source_of(module: types.ModuleType) -> str:
    """The module's source, as it was when first asked for."""
    assert module.__file__ is not None
    assert module.__file__.endswith(".py"), f"{module.__name__} is compiled and cannot be changed: set AIOTRT_IMPL=python"
    return Path(module.__file__).read_text(encoding="utf-8")


def _nodes(tree: ast.AST) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """All nodes with their ancestors, always in the same order."""

    def walk(node: ast.AST, above: tuple[ast.AST, ...]) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
        yield node, above
        for child in ast.iter_child_nodes(node):
            yield from walk(child, (*above, node))

    return walk(tree, ())


@functools.cache
def _tree(module: types.ModuleType) -> ast.Module:
    return ast.parse(source_of(module))


def places(module: types.ModuleType) -> Iterator[tuple[Place, ast.AST, tuple[ast.AST, ...]]]:
    """Every node inside a function, with its ancestors."""
    indices: dict[int, int] = {}
    for index, (node, above) in enumerate(_nodes(_tree(module))):
        indices[id(node)] = index
        functions = [a for a in above if isinstance(a, Function)]
        if not functions or not hasattr(node, "lineno"):
            continue
        outer = functions[0]
        if any(node is part or part in above for part in (*outer.decorator_list, outer.args, outer.returns)):
            continue  # evaluated when the function is made, not when it runs
        names = [a.name for a in above if isinstance(a, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        upto = above.index(outer)
        qualified = ".".join([a.name for a in above[:upto] if isinstance(a, ast.ClassDef)] + [outer.name])
        first = min([outer.lineno, *[d.lineno for d in outer.decorator_list]])
        line = int(node.lineno)
        text = " ".join(ast.unparse(node).split())
        statement = next(indices[id(a)] for a in (node, *reversed(above)) if isinstance(a, ast.stmt))
        yield Place(module, ".".join(names), (qualified, first), line, text, index, statement), node, above


def deletions(module: types.ModuleType) -> Iterator[Mutation]:
    """The removal of each statement that acts: that calls something, or changes an attribute or an item."""
    for place, node, _ in places(module):
        if _acts(node):
            yield Mutation(place, REMOVED, lambda node: ast.copy_location(ast.Pass(), node))


def _acts(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Call() | ast.Await()):
            return True
        case ast.AugAssign() | ast.Delete():
            return True
        case ast.Assign(targets=targets):
            return any(_is_state(target) for target in targets)
        case ast.AnnAssign(target=target, value=ast.AST()):
            return _is_state(target)
        case _:
            return False


def _is_state(target: ast.expr) -> bool:
    if isinstance(target, ast.Tuple):
        return any(map(_is_state, target.elts))
    return isinstance(target, (ast.Attribute, ast.Subscript))


# Applying...


@contextlib.contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The runtime has this mutation."""
    function, code = _changed(mutation)
    before, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = before


@contextlib.contextmanager
def rewritten(module: types.ModuleType, name: str, *changes: tuple[str, str]) -> Iterator[None]:
    """The function `name` of `module` has other source text.

    Args:
        module: a module of the runtime.
        name: the qualified name of a function or method in it.
        changes: pairs of a text that stands exactly once in that function, and what replaces it. Both may span lines, with
            the module's own indentation.

    Raises:
        StaleEditError: there is no such function, or a text does not stand in it exactly once.
    """
    function, code = _rewritten(module, name, changes)
    original, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = original


@contextlib.contextmanager
def instrumented(mutations: Sequence[Mutation], note: Callable[[Sequence[int]], object]) -> Iterator[None]:
    """Call `note` with the numbers of all mutations in a statement, whenever it is about to run."""
    before: list[tuple[types.FunctionType, types.CodeType]] = []
    try:
        for function, code in _noting(tuple(mutations)):
            before.append((function, function.__code__))
            function.__globals__["__note__"] = note
            function.__code__ = code
        yield
    finally:
        for function, code in before:
            function.__code__ = code
            function.__globals__.pop("__note__", None)


# Compiling costs more than most runs, and both are mostly done again for the same...


@functools.lru_cache(maxsize=1)
def _changed(mutation: Mutation) -> tuple[types.FunctionType, types.CodeType]:
    place = mutation.place
    code = _compiled(place.module, {place.index: mutation.edit})
    return _live(place.module)[place.outer], _codes(code)[place.outer]


@functools.lru_cache(maxsize=32)
def _rewritten(
    module: types.ModuleType, name: str, changes: tuple[tuple[str, str], ...]
) -> tuple[types.FunctionType, types.CodeType]:
    where = f"{module.__name__}.{name}"
    live = [function for (qualified, _), function in _live(module).items() if qualified == name]
    if len(live) != 1:
        raise StaleEditError(f"{where}: expected one such function, found {len(live)}: name the function that does this now")
    source = source_of(module)
    first = live[0].__code__.co_firstlineno
    node = next(
        node
        for node in ast.walk(_tree(module))
        if isinstance(node, Function) and min([node.lineno, *[d.lineno for d in node.decorator_list]]) == first
    )
    assert node.end_lineno is not None
    lines = source.splitlines(keepends=True)
    text = "".join(lines[first - 1 : node.end_lineno])
    for before, after in changes:
        if text.count(before) != 1:
            raise StaleEditError(f"{where}: expected this text once, found it {text.count(before)} times: {before!r}")
        text = text.replace(before, after)
    lines[first - 1 : node.end_lineno] = [text]
    assert module.__file__ is not None
    code = compile("".join(lines), module.__file__, "exec", dont_inherit=True)
    return live[0], _codes(code)[name, first]


@functools.lru_cache(maxsize=1)
def _noting(mutations: tuple[Mutation, ...]) -> list[tuple[types.FunctionType, types.CodeType]]:
    found = []
    for module in dict.fromkeys(mutation.place.module for mutation in mutations):
        mine: dict[int, list[int]] = {}
        for i, mutation in enumerate(mutations):
            if mutation.place.module is module:
                mine.setdefault(mutation.place.statement, []).append(i)
        codes = _codes(_compiled(module, {at: functools.partial(_noted, tuple(i)) for at, i in mine.items()}))
        live = _live(module)
        outer = dict.fromkeys(mutation.place.outer for mutation in mutations if mutation.place.module is module)
        found += [(live[name], codes[name]) for name in outer]
    return found


def _noted(numbers: tuple[int, ...], node: ast.AST) -> ast.AST:
    call = ast.Expr(ast.Call(ast.Name("__note__", ast.Load()), [_constant(numbers)], []))
    assert isinstance(node, ast.stmt)
    return ast.If(ast.Constant(value=True), [call, node], [])


def _constant(value: Any) -> ast.Constant:
    return ast.Constant(value)  # a tuple too, though its hints do not say so


class _Editor(ast.NodeTransformer):
    def __init__(self, edits: dict[int, Callable[[ast.AST], ast.AST]]) -> None:
        self._edits = edits  # by identity of the node

    def visit(self, node: ast.AST) -> ast.AST:
        edit = self._edits.get(id(node))
        node = self.generic_visit(node)
        return node if edit is None else edit(node)


def _compiled(module: types.ModuleType, edits: dict[int, Callable[[ast.AST], ast.AST]]) -> types.CodeType:
    tree = ast.parse(source_of(module))
    by_identity = {id(node): edits[index] for index, (node, _) in enumerate(_nodes(tree)) if index in edits}
    assert len(by_identity) == len(edits)
    edited = ast.fix_missing_locations(_Editor(by_identity).visit(tree))
    assert isinstance(edited, ast.Module)
    assert module.__file__ is not None
    return compile(edited, module.__file__, "exec", dont_inherit=True)


def _codes(code: types.CodeType) -> dict[tuple[str, int], types.CodeType]:
    """All code objects, by name and first line."""
    found = {}
    todo = [code]
    while todo:
        one = todo.pop()
        found[one.co_qualname, one.co_firstlineno] = one
        todo += [constant for constant in one.co_consts if isinstance(constant, types.CodeType)]
    return found


@functools.cache
def _live(module: types.ModuleType) -> dict[tuple[str, int], types.FunctionType]:
    """The functions of a module and its classes, by name and first line."""
    found = {}
    todo: list[object] = list(vars(module).values())
    seen: set[int] = set()
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, type):
            if thing.__module__ == module.__name__:
                todo += vars(thing).values()
        elif isinstance(thing, property):
            todo += [thing.fget, thing.fset]
        elif isinstance(thing, (classmethod, staticmethod)):
            todo.append(thing.__func__)
        elif isinstance(thing, types.FunctionType):
            thing = inspect.unwrap(thing)
            assert isinstance(thing, types.FunctionType)
            if thing.__code__.co_filename == module.__file__:
                found[thing.__code__.co_qualname, thing.__code__.co_firstlineno] = thing
    return found
