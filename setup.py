"""Say which Python is needed, where an old pip would say that packages conflict; all else is in pyproject.toml."""

import sys

import setuptools

if not (3, 11) <= sys.version_info < (3, 14):
    sys.exit("training-notes needs Python 3.11 to 3.13, this is {}.{}".format(*sys.version_info))

setuptools.setup()
