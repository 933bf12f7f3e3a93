"""Every fault of faults.py is noticed by the test beside it, which passes on the sources as they are."""

from __future__ import annotations

import importlib
import inspect

import emulator
import pytest
from faults import FAULTS, Check

passed: set[str] = set()
"""Tests that were seen to pass on the sources as they are."""


@pytest.fixture
def run(machine):
    def call(check: Check) -> None:
        function = getattr(importlib.import_module(check.module), check.name)
        function(*([machine] if "machine" in inspect.signature(function).parameters else []), *check.arguments)

    return call


def test_names_are_unique():
    names = [(fault.file, fault.name) for fault in FAULTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file.split('.')[0]}: {fault.name}")
def test_fault(fault, run):
    if repr(fault.caught_by) not in passed:
        run(fault.caught_by)
        passed.add(repr(fault.caught_by))
    with emulator.altered(fault.file, fault.old, fault.new):
        with pytest.raises((AssertionError, RuntimeError)):
            run(fault.caught_by)
