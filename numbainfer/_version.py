"""The package's version, read by setup.cfg, `numbainfer --version` and bench's rows."""

__version__ = "0.1.0"
