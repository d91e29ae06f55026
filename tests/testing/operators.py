"""Small changes to the operators, constants and results of a module, one at a time: what a typo would do.

A comparison is flipped (both ways, where it has an order), a condition negated, a `not` dropped, `and` and `or` swapped,
arithmetic swapped, a constant moved by one, `min` and `max` swapped, and a result forgotten. Left alone: what only a reader
of a message sees, what stands in an `assert`, and annotations.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.testing.mutation import Mutation, places

__all__ = ["changes"]

Edit = Callable[[Any], ast.AST]

COMPARISONS: Final[dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
OTHER_END: Final = {"min": "max", "max": "min"}


def changes(module: types.ModuleType) -> Iterator[Mutation]:
    """All of them."""
    for place, node, above in places(module):
        if _is_left_alone(node, above):
            continue
        head = ast.unparse(next(a for a in (node, *reversed(above)) if isinstance(a, ast.stmt))).split("\n")[0]
        for edit in _edits(node, above[-1]):
            after = " ".join(ast.unparse(ast.fix_missing_locations(edit(copy.deepcopy(node)))).split())
            before = head if isinstance(node, ast.stmt) else place.text
            where = "" if before == head else f", in: {head}"
            yield Mutation(place, f"{before} -> {after}{where}", edit)


def _is_left_alone(node: ast.AST, above: tuple[ast.AST, ...]) -> bool:
    for outer, inner in zip((*above, node), (*above[1:], node, None), strict=True):
        if isinstance(outer, (ast.Assert, ast.JoinedStr)):
            return True
        if isinstance(outer, (ast.arg, ast.AnnAssign)) and inner is not None and inner is outer.annotation:
            return True
    return False


def _edits(node: ast.AST, parent: ast.AST) -> Iterator[Edit]:
    if _is_condition(node, parent):
        yield _negated
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for other in COMPARISONS[type(op)]:
                    yield functools.partial(_flipped, at=i, other=other)
        case ast.BoolOp(op=ast.And()):
            yield lambda node: _with(node, op=ast.Or())
        case ast.BoolOp(op=ast.Or()):
            yield lambda node: _with(node, op=ast.And())
        case ast.UnaryOp(op=ast.Not()):
            yield lambda node: node.operand
        case ast.BinOp(left=left, right=right, op=op) if type(op) in ARITHMETIC and not (_is_text(left) or _is_text(right)):
            yield lambda node: _with(node, op=ARITHMETIC[type(node.op)]())
        case ast.AugAssign(op=op, value=value) if type(op) in ARITHMETIC and not _is_text(value):
            yield lambda node: _with(node, op=ARITHMETIC[type(node.op)]())
        case ast.Constant(value=bool(value)):
            yield lambda node: _with(node, value=not node.value)
        case ast.Constant(value=int() | float()):
            yield lambda node: _with(node, value=node.value + 1)
            yield lambda node: _with(node, value=node.value - 1)
        case ast.Return(value=ast.AST() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield lambda node: _with(node, value=ast.Constant(None))
        case ast.Call(func=ast.Name(id="min" | "max")):
            yield lambda node: _with(node, func=ast.Name(OTHER_END[node.func.id], ast.Load()))
        case _:
            pass


def _is_condition(node: ast.AST, parent: ast.AST) -> bool:
    """Whether it is one that no flipped comparison and no dropped `not` negates."""
    match parent:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            conditions = [test]
        case ast.comprehension(ifs=ifs):
            conditions = ifs
        case _:
            return False
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return False
    return node in conditions and not isinstance(node, ast.Constant) and not _is_not(node)


def _flipped(node: Any, at: int, other: type[ast.cmpop]) -> ast.AST:
    return _with(node, ops=[*node.ops[:at], other(), *node.ops[at + 1 :]])


def _negated(node: Any) -> ast.AST:
    return ast.copy_location(ast.UnaryOp(ast.Not(), node), node)


def _is_not(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _with(node: Any, **fields: object) -> ast.AST:
    """The node with these fields instead."""
    for name, value in fields.items():
        setattr(node, name, value)
    fixed: ast.AST = ast.fix_missing_locations(node)
    return fixed
