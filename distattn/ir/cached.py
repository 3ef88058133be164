"""Properties that are computed once per instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

_Value = TypeVar("_Value")


class cached_property(Generic[_Value]):  # noqa: N801 - named as functools' own
    """A property like `functools.cached_property` in Python 3.12, which has no lock.

    In Python 3.11, all instances share one lock per property, so plans would wait for each other, and a process forked while a
    planning thread holds the lock would wait forever. If two threads both compute a value, the values are equal.
    """

    def __init__(self, compute: Callable[[Any], _Value]):
        self._compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached_property[_Value]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> _Value: ...

    def __get__(self, instance: object | None, owner: type) -> cached_property[_Value] | _Value:
        if instance is None:
            return self
        # later accesses bypass this descriptor, because the instance's attribute takes precedence
        value = instance.__dict__[self._name] = self._compute(instance)
        return value
