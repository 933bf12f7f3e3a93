"""Fixtures of the tests that make whole calls on the emulator."""

from whole_call import guards, machine  # noqa: F401 - fixtures
