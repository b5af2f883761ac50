"""Imports are put off as on the command line, so that all tests show that they work when they are used."""

from minikin import lazy_imports

lazy_imports.install()
