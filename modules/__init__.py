"""Loadstone's rooms. Dependencies point one way; ``pyproject.toml`` holds the contract."""
