"""Fixtures: `machine` and `ops`, on each kind of device that this computer has, and checkpoints of tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from machine import Machine
from tiny_tokenizers import letters

from numbainfer.device import Device
from numbainfer.errors import NumbaInferError
from numbainfer.registry import Operators, bind


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=500, help="damaged files of each format in test_fuzz.py")


@cache
def bound(kind: str, threads: int | None) -> Operators | str:
    """The operators of a device, bound once for all tests; or why there are none."""
    try:
        return bind(Device(kind), threads)
    except (NumbaInferError, ImportError) as failure:
        return str(failure)


def operators(kind: str, threads: int | None = None) -> Operators:
    """A device's operators; skips the test where the device or its backend is not there."""
    ops = bound(kind, threads)
    if isinstance(ops, str):
        pytest.skip(ops)
    return ops


def open_machine(kind: str, threads: int | None = None, captured: bool = False) -> Machine:
    """A Machine; skips as `operators` does."""
    return Machine(operators(kind, threads), captured)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of device."""
    return request.param


@pytest.fixture
def machine(kind: str) -> Iterator[Machine]:
    machine = open_machine(kind)
    yield machine
    machine.close()


@pytest.fixture
def ops(kind: str) -> Operators:
    """The operators of each kind of device."""
    return operators(kind)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_models.write_hf_checkpoint with a tokenizer beside the weights, each written once: not to be changed."""

    @cache
    def write(name: str, **options: Any) -> Path:
        directory = tiny_models.write_hf_checkpoint(name, tmp_path_factory.mktemp(name), **options)
        (directory / "tokenizer.json").write_bytes(letters())
        return directory

    return write
