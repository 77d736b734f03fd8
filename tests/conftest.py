"""The `machine` fixture: every operator test runs once for each kind of device that this computer has."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
from machine import Machine

from numbainfer.device import Device
from numbainfer.errors import NumbaInferError
from numbainfer.registry import Operators, bind


@lru_cache(maxsize=None)
def bound(kind: str, threads: int | None) -> Operators | str:
    """The operators of a device, bound once for all tests; or why there are none."""
    try:
        return bind(Device(kind), threads)
    except (NumbaInferError, ImportError) as failure:
        return str(failure)


def open_machine(kind: str, threads: int | None = None, captured: bool = False) -> Machine:
    """A Machine; skips the test where the device or its backend is not there."""
    ops = bound(kind, threads)
    if isinstance(ops, str):
        pytest.skip(ops)
    return Machine(ops, captured)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of device."""
    return request.param


@pytest.fixture
def machine(kind: str) -> Iterator[Machine]:
    machine = open_machine(kind)
    yield machine
    machine.close()
