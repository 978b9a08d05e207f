"""What a block of the documentation leaves open: names it uses and does not bind, and ``...``."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable

AS_ALWAYS = "_as_always_"  # called where a block says ``...`` as a statement


class _OpenNames(ast.NodeVisitor):
    """Follows a block in the order of evaluation; bodies of functions come after the rest."""

    def __init__(self) -> None:
        self.bound: list[set[str]] = [set(dir(builtins))]
        self.open: dict[str, None] = {}  # in the order of their use
        self.bodies: list[tuple[list[set[str]], ast.AST]] = []

    def run(self, tree: ast.Module) -> list[str]:
        self.visit(tree)
        while self.bodies:
            self.bound, function = self.bodies.pop(0)
            body = function.body if isinstance(function.body, list) else [function.body]  # type: ignore[attr-defined]
            self._all(body)
        return list(self.open)

    def _all(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self.bound[-1].add(node.id)
        elif not any(node.id in names for names in self.bound):
            self.open[node.id] = None

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.bound[-1] |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}

    visit_ImportFrom = visit_Import

    def visit_Assign(self, node: ast.Assign) -> None:
        self._all([node.value, *node.targets])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._all([node.annotation, node.value, node.target])

    def visit_For(self, node: ast.For) -> None:
        self._all([node.iter, node.target, *node.body, *node.orelse])

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        self.bound.append(set())
        for part in node.generators:
            self._all([part.iter, part.target, *part.ifs])
        self._all([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])
        self.bound.pop()

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._all([*node.decorator_list, *node.bases, *node.keywords])
        self.bound.append(set())
        self._all(node.body)
        self.bound.pop()
        self.bound[-1].add(node.name)

    def _function(self, node: ast.FunctionDef | ast.Lambda) -> None:
        given = node.args
        parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        self._all([*given.defaults, *given.kw_defaults])
        if isinstance(node, ast.FunctionDef):
            self._all([*node.decorator_list, node.returns])
            self._all(one.annotation for one in parameters if one is not None)
            self.bound[-1].add(node.name)
        inner = {one.arg for one in parameters if one is not None}
        self.bodies.append(([*self.bound, inner], node))

    visit_FunctionDef = visit_Lambda = _function


def find_open_names(tree: ast.Module) -> list[str]:
    """The names that a block reads before it binds them, builtins aside."""
    return _OpenNames().run(tree)


class _Completed(ast.NodeTransformer):
    """Puts calls in place of ``...`` and a folder of the test in place of shared ones.

    Args:
        arguments: source of the arguments that ``...`` as a call's first stands for; a later one is dropped.
        folder: in place of ``/shared``.
    """

    def __init__(self, arguments: str, folder: str) -> None:
        self.arguments, self.folder, self.loops = arguments, folder, 0

    def visit_For(self, node: ast.For) -> ast.AST:
        self.loops += 1
        node = self.generic_visit(node)  # type: ignore[assignment]
        self.loops -= 1
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant) and node.value.value is ...:
            names = ", ".join(["None"] if not self.loops else ["x", "y"])
            return ast.parse(f"{AS_ALWAYS}({names})").body[0]
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        first = bool(node.args) and _is_ellipsis(node.args[0])
        node.args = [one for one in node.args if not _is_ellipsis(one)]
        if first:
            usual = ast.parse(f"f({self.arguments})", mode="eval").body
            assert isinstance(usual, ast.Call)
            node.args[:0], node.keywords[:0] = usual.args, usual.keywords
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value.startswith("/shared/"):
            return ast.Constant(node.value.replace("/shared", self.folder, 1))
        return node


def _is_ellipsis(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def complete_block(source: str, arguments: str, folder: str) -> ast.Module:
    """The block as it can be run; one that continues a loop (``continue``) is a pass of that loop."""
    tree = ast.parse(source)
    try:
        compile(source, "<block>", "exec")
    except SyntaxError as error:
        if "loop" not in str(error):
            raise
        loop = ast.parse("for _ in range(1): pass").body[0]
        assert isinstance(loop, ast.For)
        loop.body, tree.body = tree.body, [loop]
    return ast.fix_missing_locations(_Completed(arguments, folder).visit(tree))
