"""OSMF: the command line, the settings and the demo; the front door of the system."""

__version__ = "0.1.0"
