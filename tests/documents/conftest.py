"""What the tests here open documents with is installed before they are collected, where that may be done."""

from contextlib import suppress

from programs import PACKAGES, CannotRun, program

for name in PACKAGES:
    with suppress(CannotRun):  # which the tests say of themselves
        program(name)
