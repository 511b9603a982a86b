"""A real docker-compose, on a project of its own."""

import os
import subprocess
from pathlib import Path
from typing import Final

from support import processes
from support.docker import Docker
from support.require import require

PROJECT: Final = "shop"
"""Compose's prefix of the names of volumes and containers: its folder's name."""


class ComposeError(Exception):
    """The command failed: what it printed."""


class Compose:
    """Call it with a command line's words: ``compose("up", "-d")``."""

    def __init__(self, docker: Docker, folder: Path) -> None:
        self._command = [require("docker-compose"), "--ansi", "never"]
        self._socket = docker.client.socket
        self.folder = folder / PROJECT
        self.folder.mkdir()

    def write(self, text: str) -> None:
        """Make ``text`` the project's file."""
        (self.folder / "docker-compose.yml").write_text(text)

    def __call__(self, *words: str) -> str:
        """Run ``docker-compose`` with ``words`` and return what it prints, stripped.

        Raise `ComposeError` when it fails.
        """
        done = subprocess.run(
            [*self._command, *words],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                "PATH": os.environ.get("PATH", ""),
                processes.SESSION: os.environ[processes.SESSION],
                "HOME": str(self.folder),
                "DOCKER_HOST": f"unix://{self._socket}",
            },
            timeout=90,
            check=False,
        )
        if done.returncode:
            raise ComposeError(done.stdout.strip())
        return done.stdout.strip()
