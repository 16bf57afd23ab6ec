"""Builds the native extension jv5kernels._C; all metadata is in pyproject.toml."""

from setuptools import setup

setup()
