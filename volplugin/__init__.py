"""A volume plugin for Docker, Podman and PouchContainer."""

__version__ = "0.1.0"
