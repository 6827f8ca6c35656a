"""Sets of samples by an expression over score columns: `top(clip_score, 0.3) - bottom(mimic_score, 0.2)`.

Read `CombinedFilter`; `_Reader` has a method for every part of the grammar. An expression is read as Python's syntax
tree and never run.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from hf_mimic.cuts import FALLING, FilterResult, ScoreFilter, Votes
from hf_mimic.filters import top_p
from hf_mimic.scores import ScoreTable

Columns = Mapping[str, np.ndarray]
_GRAMMAR = (
    "An expression has sets: top(COLUMN, SHARE), bottom(COLUMN, SHARE), known(COLUMN), comparisons like (trust >= 0.5); "
    "and their combinations: A & B, A | B, A - B, ~A, with brackets."
)
_COMPARE: dict[type[ast.cmpop], Callable[[np.ndarray, float], np.ndarray]] = {
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}
_COMBINE: dict[type[ast.operator], Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    ast.BitAnd: np.logical_and,
    ast.BitOr: np.logical_or,
    ast.Sub: lambda a, b: a & ~b,
}


class CombinedFilter(ScoreFilter):
    """Keep what an expression over columns selects, as the paper's DataComp filters: CLIPScore minus the mimic bottom.

    `top` and `bottom` go by better and worse: of losses the lowest are the top. A sample without a value is in no top, no
    bottom and no comparison, so `- bottom(...)` keeps it; write `& known(COLUMN)` where it must have one.

    Args:
        expression: For instance "top(clip_score, 0.3) - bottom(mimic_score, 0.2)".

    References:
        Mimic Score, arXiv 2501.06708, table of DataComp filters.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def fit(self, scores: ScoreTable | pa.Table | Columns, y: Any = None) -> CombinedFilter:
        """Check the expression against the columns; nothing is learned.

        Args:
            scores: A `ScoreTable`, or columns (N,) by name.
            y: Not used.

        Raises:
            ValueError: If the expression cannot be read, or names a column that is not there.
        """
        self.predict(scores)
        return self

    def predict(self, scores: ScoreTable | pa.Table | Columns) -> np.ndarray:
        """Return what to keep, booleans (N,)."""
        return _Reader(self.expression, _columns(scores)[0]).read_all()

    def fit_predict(self, scores: ScoreTable | pa.Table | Columns, y: Any = None) -> np.ndarray:
        """Return what to keep, booleans (N,)."""
        return self.predict(scores)  # which checks as `fit` does

    def votes(self, scores: ScoreTable | pa.Table | Columns) -> Votes:
        """Return the decision as one vote of each sample (N, 1)."""
        result = self.filter(scores)
        return Votes(result.sample_id, result.keep[:, None].astype(np.int8), result.keep - 0.5)

    def filter(self, scores: ScoreTable | pa.Table | Columns) -> FilterResult:
        """Return what is kept, what is dropped, and by which part of the expression."""
        columns, ids = _columns(scores)
        reader = _Reader(self.expression, columns)
        keep = reader.read_all()
        code, reasons = np.zeros(len(keep), dtype=np.int32), [f"in {ast.unparse(reader.tree)}"]
        code[~keep] = -1
        for part, wanted in _parts(reader.tree, True):
            found = reader.read(part)
            failed = (code == -1) & (found != wanted)
            code[failed] = len(reasons)
            reasons.append(f"{'not in' if wanted else 'in'} {ast.unparse(part)}")
        code[code == -1] = len(reasons)
        return FilterResult(ids, keep, code, (*reasons, f"not in {ast.unparse(reader.tree)}"))


def _parts(node: ast.expr, wanted: bool) -> list[tuple[ast.expr, bool]]:
    """Return the sets that a kept sample must be in (or not): what `&`, `-` and `~` join at the top."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd) and wanted:
        return _parts(node.left, True) + _parts(node.right, True)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and wanted:
        return _parts(node.left, True) + _parts(node.right, False)
    if isinstance(node, ast.UnaryOp):
        return _parts(node.operand, not wanted)
    return [(node, wanted)]


class _Reader:
    """Reads one expression over the columns (N,) of a table."""

    def __init__(self, expression: str, columns: Columns) -> None:
        self.columns = columns
        try:
            self.tree = ast.parse(str(expression).strip(), mode="eval").body
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise ValueError(
                f"`expression` must be readable, got {str(expression)[:200]!r} ({error}). {_GRAMMAR}"
            ) from error

    def read_all(self) -> np.ndarray:
        """Return the set of the whole expression."""
        try:
            return self.read(self.tree)
        except RecursionError as error:
            raise ValueError("`expression` must not be nested so deeply. Use fewer brackets.") from error

    def read(self, node: ast.expr) -> np.ndarray:
        """Return a set of samples, booleans (N,)."""
        if isinstance(node, ast.BinOp) and type(node.op) in _COMBINE:
            return _COMBINE[type(node.op)](self.read(node.left), self.read(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~self.read(node.operand)
        if isinstance(node, ast.Compare):
            return self._compared(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._called(node.func.id, node.args)
        if isinstance(node, ast.Name) and self._column(node).dtype == bool:
            return self._column(node)
        raise self._refusal(node)

    def _compared(self, node: ast.Compare) -> np.ndarray:
        if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARE or not isinstance(node.left, ast.Name):
            raise self._refusal(
                node, "Put each comparison in brackets, the column first: (trust >= 0.5) & (loss < 2)."
            )
        values = self._known(node.left).astype(float)  # against float32, numpy would round the number
        number = self._number(node.comparators[0])
        return _COMPARE[type(node.ops[0])](values, number) & ~np.isnan(values)

    def _called(self, name: str, args: list[ast.expr]) -> np.ndarray:
        if name == "known" and len(args) == 1:
            return ~np.isnan(self._column(args[0]))
        if name not in ("top", "bottom") or len(args) != 2:
            raise ValueError(
                f"a set must be top, bottom or known, got `{name}` with {len(args)} arguments. {_GRAMMAR}"
            )
        share = self._number(args[1])
        values = self._known(args[0])
        if not 0 < share <= 1:
            raise ValueError(f"the share of `{name}` must be in (0, 1], got {share}. Use 0.3 for 30 %.")
        rising = (name == "top") != (isinstance(args[0], ast.Name) and args[0].id in FALLING)
        known = ~np.isnan(values)
        if known.all():
            return top_p(values if rising else -values, share)
        known[known] = top_p(values[known] if rising else -values[known], share)
        return known

    def _column(self, node: ast.expr) -> np.ndarray:
        if not isinstance(node, ast.Name):
            raise self._refusal(node, "A column was expected there.")
        if node.id not in self.columns:
            close = difflib.get_close_matches(node.id, self.columns, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"a column must be one of {', '.join(self.columns)}, got {node.id!r}.{hint}")
        values = np.asarray(self.columns[node.id])
        if values.dtype.kind not in "fiub":
            raise ValueError(f"a column of an expression must have numbers, `{node.id}` has {values.dtype}.")
        return values

    def _known(self, node: ast.expr) -> np.ndarray:
        """Return a column with a value at least: of one without, no set is meant."""
        values = self._column(node)
        if len(values) and np.isnan(values).all():
            numbers = {name: np.asarray(v) for name, v in self.columns.items() if np.asarray(v).dtype.kind in "fiub"}
            there = [name for name, column in numbers.items() if not np.isnan(column).all()]
            raise ValueError(
                f"a column of an expression must have values, `{ast.unparse(node)}` has none. There are: {', '.join(there)}."
            )
        return values

    def _number(self, node: ast.expr) -> float:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, node = -1, node.operand
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return sign * float(node.value)
        raise self._refusal(node, "A number was expected there.")

    def _refusal(self, node: ast.expr, hint: str = _GRAMMAR) -> ValueError:
        return ValueError(f"`expression` cannot have {ast.unparse(node)!r} there. {hint}")


class _Arrow(Columns):
    """The columns of a table that have numbers, each made when it is asked for: of millions of rows most are not."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.names = [name for name in table.column_names if _has_numbers(table.schema.field(name).type)]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(name)
        return _numbers(self.table[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _columns(scores: ScoreTable | pa.Table | Columns) -> tuple[Columns, np.ndarray]:
    table = scores.aggregate() if isinstance(scores, ScoreTable) else scores
    if isinstance(table, pa.Table):
        columns: Columns = _Arrow(table)
        lengths = {len(table)}
    else:
        columns = {name: np.asarray(values) for name, values in table.items()}
        lengths = {len(values) for values in columns.values()}
    if not columns or len(lengths) != 1:
        raise ValueError("an expression must have columns of one length, got none or several. Give a `ScoreTable`.")
    return columns, columns["sample_id"] if "sample_id" in columns else np.arange(lengths.pop())


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Return the values (N,); NaN for null, so that booleans with nulls become numbers."""
    if pa.types.is_boolean(column.type) and column.null_count:
        column = column.cast(pa.int8()).cast(pa.float32())
    return column.to_numpy()


def _has_numbers(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
