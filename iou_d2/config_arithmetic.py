"""The arithmetic in Detectron2's configs, which Python would evaluate: parsed and computed here."""

from __future__ import annotations

import ast
import math
import operator

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LONGEST_TEXT = 2000
_MOST_STEPS = 20_000
_LARGEST = 2.0**63
_LARGEST_EXPONENT = 64


def compute(text: str) -> int | float | list | tuple:
    """The value of numbers, + - * / // % **, lists, tuples and list comprehensions over lists.

    Raises:
        ValueError: anything else, a number beyond 2^63, or more than 20,000 steps.
    """
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"it has {len(text)} characters, of {_LONGEST_TEXT} at most")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _Arithmetic().value(tree.body, {})
    except (SyntaxError, RecursionError, MemoryError, ArithmeticError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


class _Arithmetic:
    def __init__(self):
        self.steps = 0

    def value(self, node: ast.expr, names: dict) -> int | float | list | tuple:
        """`names` are the variables of the comprehensions around `node`."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise ValueError(f"it takes more than {_MOST_STEPS} steps")
        if isinstance(node, ast.Constant):
            return _bounded(node.value)
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, (ast.List, ast.Tuple)):
            values = [self.value(element, names) for element in node.elts]
            return values if isinstance(node, ast.List) else tuple(values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            number = _bounded(self.value(node.operand, names))
            return -number if isinstance(node.op, ast.USub) else number
        if isinstance(node, ast.BinOp):
            left, right = (_bounded(self.value(side, names)) for side in (node.left, node.right))
            return _bounded(_operate(node.op, left, right))
        if isinstance(node, ast.ListComp):
            return self.comprehension(node.elt, node.generators, names)
        raise ValueError(f"{ast.unparse(node)[:60]} is no arithmetic")

    def comprehension(self, element: ast.expr, loops: list[ast.comprehension], names: dict) -> list:
        if not loops:
            return [self.value(element, names)]
        loop = loops[0]
        if loop.ifs or loop.is_async:
            raise ValueError("a comprehension with a condition is no arithmetic")
        values = self.value(loop.iter, names)
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{ast.unparse(loop.iter)[:60]} is no list")
        found = []
        for value in values:
            self.steps += 1
            found += self.comprehension(element, loops[1:], names | _bind(loop.target, value))
        return found


def _bind(target: ast.expr, value: object) -> dict:
    """The names that `target`, a name or a tuple of them, gives to parts of `value`."""
    if isinstance(target, ast.Name):
        return {target.id: value}
    is_pair = isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (list, tuple))
    if not is_pair or len(target.elts) != len(value):
        raise ValueError(f"{ast.unparse(target)[:60]} takes no parts of {str(value)[:60]}")
    bound = {}
    for part, its_value in zip(target.elts, value):
        bound |= _bind(part, its_value)
    return bound


def _operate(symbol: ast.operator, left: int | float, right: int | float) -> int | float:
    if isinstance(symbol, ast.Pow):
        if abs(right) > _LARGEST_EXPONENT:
            raise ValueError(f"the exponent {right} is beyond {_LARGEST_EXPONENT}")
        return left**right
    if type(symbol) not in _OPERATORS:
        raise ValueError(f"{type(symbol).__name__} is no arithmetic")
    return _OPERATORS[type(symbol)](left, right)


def _bounded(number: object) -> int | float:
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        raise ValueError(f"{str(number)[:60]} is no number")
    if not math.isfinite(number) or abs(number) > _LARGEST:
        raise ValueError("a number is beyond 2^63")
    return number
