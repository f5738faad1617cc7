"""Families of small trained models that ship with the package, for the demo and the tests."""
