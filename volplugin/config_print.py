"""The configuration as the TOML text that `volplugin.config` reads back."""

import attrs

from volplugin import toml
from volplugin.config import SCALARS
from volplugin.config_values import Config


def render(config: Config) -> str:
    """Return the TOML text from which `config.load` makes the same configuration."""
    top = attrs.asdict(config, recurse=False) | {
        "usage_marks": ",".join(map(str, config.usage_marks))
    }
    scalars = {key: top[_attribute(key)] for key in SCALARS}
    lines = [toml.line(*each) for each in scalars.items() if each[1] is not None]
    lines += ["", "[timeouts]"]
    lines += [
        toml.line(key, value) for key, value in attrs.asdict(config.timeouts).items()
    ]
    for number, socket in enumerate(config.sockets, 1):
        values = attrs.asdict(socket) | {"mode": f"{socket.mode:04o}"}
        lines += ["", f"[socket.{number}]"]
        lines += [
            toml.line(key.replace("_", "-"), value)
            for key, value in values.items()
            if value is not None
        ]
    for backend in config.backends.values():
        lines += [
            "",
            f"[backend.{toml.key(backend.name)}]",
            toml.line("driver", backend.driver),
        ]
        lines += [toml.line(key, value) for key, value in backend.settings.items()]
    return "\n".join(lines) + "\n"


def _attribute(key: str) -> str:
    return key.replace("-", "_")
