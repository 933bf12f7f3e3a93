"""Fixtures of the tests that make whole calls on the emulator."""

import pytest
from whole_call import guards, machine  # noqa: F401 - fixtures

pytest.register_assert_rewrite("prepass_case", "prepass_reference")  # which look at results as tests do
