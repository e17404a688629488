"""Faults made on purpose, to see that the tests notice: ``python -m tests.faults``."""
