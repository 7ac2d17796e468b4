"""Statements written in SQLAlchemy Core, and run by the databases' own drivers.

Core's execution costs ten times what SQLite takes for such a statement, so each is compiled once,
for as long as it lives: one that is run often is a constant of its module. They are written once
for both databases: SQLite's dialect knows PostgreSQL's ``ON CONFLICT``, and leaves ``FOR UPDATE``
out, for its one writer needs no locks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from sqlalchemy import Delete, Insert, Select, Text, Update
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import ClauseElement

from hive_orchestration.schema import check_text

Params = Mapping[str, Any]
Columns = tuple[str, ...] | None


class Row(Protocol):
    """A row of an answer: by a column's name, or by its place."""

    def __getitem__(self, key: Any, /) -> Any: ...
    def keys(self) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...


class Result:
    """What a statement was answered with.

    :ivar rowcount: how many rows a change has changed
    """

    __slots__ = ("_rows", "rowcount")

    def __init__(self, rows: Sequence[Any] = (), rowcount: int = 0) -> None:
        self._rows = rows
        self.rowcount = rowcount

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def all(self) -> Sequence[Any]:
        return self._rows

    def mappings(self) -> Result:
        """The same with rows as dicts, of which many columns can be had for little."""
        if not self._rows:
            return self
        names = tuple(self._rows[0].keys())
        return Result([dict(zip(names, row, strict=True)) for row in self._rows])

    def first(self) -> Any:
        """The first row, or None."""
        return self._rows[0] if self._rows else None

    def one(self) -> Any:
        """The only row."""
        [row] = self._rows
        return row

    def scalar(self) -> Any:
        """The first value of the first row, or None."""
        return self._rows[0][0] if self._rows else None

    def scalars(self) -> list[Any]:
        """The first value of each row."""
        return [row[0] for row in self._rows]


class _Compiled(NamedTuple):
    """A statement in one database's words.

    :param names: of its parameters, in their order
    :param fixed: those whose values it has itself
    :param texts: the places of texts, which are looked at before they are sent
    :param changes: whether it writes
    :param answers: whether it has rows
    :param looks: whether it only reads, and locks nothing
    """

    sql: str
    names: tuple[str, ...]
    fixed: dict[str, Any]
    texts: tuple[int, ...]
    changes: bool
    answers: bool
    looks: bool

    def values(self, params: Params) -> list[Any]:
        fixed = self.fixed
        values = [params[name] if name in params else fixed[name] for name in self.names]
        for place in self.texts:
            value = values[place]
            if value is not None and (not value.isascii() or "\0" in value):
                check_text(value)
        return values


_known: WeakKeyDictionary[ClauseElement, dict[tuple[bool, Columns], _Compiled]] = (
    WeakKeyDictionary()
)


class Connection(ABC):
    """A connection within a transaction.

    :cvar postgres: whether it is one of PostgreSQL, where the two need other words
    :ivar wrote: whether a statement has changed something
    :ivar first: what is to be done before the next statement
    """

    dialect: ClassVar[Dialect]
    postgres: ClassVar[bool] = False

    def __init__(self) -> None:
        self.wrote = False
        self.first: Callable[[], None] | None = None

    def execute(
        self, statement: ClauseElement, params: Params | Sequence[Params] | None = None
    ) -> Result:
        """Run a statement; with several sets of parameters, once with each.

        One with parameters may have no list of values besides (``in_([1, 2])``), for its length
        would be of this once. Columns that an ``Insert`` or ``Update`` does not name itself are
        those that have a value in the (first) parameters.
        """
        many = params is not None and not isinstance(params, Mapping)
        sets: Sequence[Params] = params if many else (params or {},)  # type: ignore[assignment]
        if not sets:
            return Result()
        compiled = self._compiled(statement, sets[0])
        values = [compiled.values(one) for one in sets]
        if self.first is not None:
            self.first()
        if not compiled.looks:
            self._begin()
        if len(sets) > 1:
            self._each(compiled.sql, values)
            self.wrote = True
            return Result()
        if not compiled.answers:
            changed = self._changed(compiled.sql, values[0])
            self.wrote = self.wrote or changed > 0
            return Result((), changed)
        rows = self._fetched(compiled.sql, values[0])
        self.wrote = self.wrote or (compiled.changes and len(rows) > 0)
        return Result(rows)

    def put(self, into: Insert, columns: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert rows whose texts were looked at.

        A column of which none of them says anything gets what the table has for it.

        :param columns: those that may have values, in the table's order
        :param rows: their values
        """
        if not rows:
            return
        nothing = (None,) * len(rows)
        had = [
            (name, values)
            for name, values in zip(columns, zip(*rows, strict=True), strict=True)
            if values != nothing  # which takes less than to say NULL
        ]
        sql = self._compiled(into, [name for name, _ in had]).sql
        few = [*zip(*(values for _, values in had), strict=True)]
        self._begin()
        if len(few) == 1:
            self._changed(sql, few[0])
        else:
            self._inserted(sql, few)
        self.wrote = True

    def last(self, statement: ClauseElement, params: Params) -> None:
        """Run what is followed by the commit alone: a transaction by itself, if it can be."""
        self.execute(statement, params)

    def _compiled(self, statement: ClauseElement, params: Iterable[str]) -> _Compiled:
        columns = tuple(params) if isinstance(statement, Insert | Update) else None
        known = _known.get(statement)
        if known is None:
            known = _known[statement] = {}
        found = known.get((self.postgres, columns))
        if found is None:
            found = _compile(statement, self.dialect, columns)
            known[self.postgres, columns] = found
        return found

    def _begin(self) -> None:  # noqa: B027  # where it has begun, there is nothing to do
        """A statement follows that must be within the transaction."""

    @abstractmethod
    def _fetched(self, sql: str, values: Sequence[Any]) -> Sequence[Any]: ...

    @abstractmethod
    def _changed(self, sql: str, values: Sequence[Any]) -> int: ...

    @abstractmethod
    def _each(self, sql: str, sets: Iterable[Sequence[Any]]) -> None: ...

    def _inserted(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        self._each(sql, rows)


def _compile(statement: ClauseElement, dialect: Dialect, columns: Columns) -> _Compiled:
    compiled: Any = statement.compile(
        dialect=dialect,
        column_keys=list(columns) if columns else None,
        compile_kwargs={"render_postcompile": True},
    )
    names = tuple(compiled.positiontup or ())
    binds = compiled.binds
    texts = [
        place
        for place, name in enumerate(names)
        if name in binds and isinstance(binds[name].type, Text)
    ]
    change = statement if isinstance(statement, Insert | Update | Delete) else None
    answers = change is None or bool(change.returning_column_descriptions)
    return _Compiled(
        compiled.string,
        names,
        {
            name: value
            for name, value in compiled.params.items()
            if name not in binds or not binds[name].required
        },
        tuple(texts),
        change is not None,
        answers,
        isinstance(statement, Select) and " FOR " not in compiled.string,
    )
