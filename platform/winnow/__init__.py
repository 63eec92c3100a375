"""What Winnow's words mean: images, models, tables' schemas, and the pure rules over them."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("winnow-vision")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"
