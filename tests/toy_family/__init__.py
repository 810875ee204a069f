"""The smallest family there can be: the template of a new one, which `tests/test_families.py` registers and runs."""
