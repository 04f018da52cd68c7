"""Measurements, each as a ratio to a bare script that does the same work in the same run.

``python -m tests.benchmarks`` runs all and prints a table; ``python -m tests.benchmarks load stream`` runs some.
They are not tests: nothing fails on a slow machine.
"""
