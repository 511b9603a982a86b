"""What users and operators can say to the driver ``plugin``."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from volplugin import options
from volplugin.errors import InvalidArgument
from volplugin.parsers import quote
from volplugin.plugins.discovery import SOCKETS, SPECS, Folders

_PASS: Final = "pass."  # noqa: S105  the word, not a secret

_PREFIX: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}", re.ASCII)


def _prefix(given: str) -> str:
    if given and not _PREFIX.fullmatch(given):
        raise InvalidArgument(
            f"{quote(given)} can't begin a volume's name; give letters, digits, '_', "
            f"'.' and '-', at most 64, the first a letter or a digit"
        )
    return given


@attrs.frozen(kw_only=True)
class PluginOptions:
    """What a user can say of one volume; all else is for the plugin."""

    plugin: str | None = options.option(
        help="the plugin that has the volume, by the name that docker knows it by",
        parse=options.text,
        default=None,
        shown="the backend's",
        unit="name",
    )
    adopt: str | None = options.option(
        help="take over the volume of this name that the plugin has already; it is "
        "kept there when this one is removed",
        parse=options.text,
        default=None,
        shown="make a new one",
        unit="name",
    )
    rest: Mapping[str, str] = options.rest(
        help="given to the plugin as it is; pass.X as X, where X is a word of ours"
    )

    def __attrs_post_init__(self) -> None:
        if self.adopt is not None and self.rest:
            raise ValueError(
                f"adopt takes a volume as it is, without {', '.join(self.rest)}"
            )


@attrs.frozen(kw_only=True)
class PluginConfig:
    """What an operator can say of the backend."""

    plugin: str | None = options.option(
        help="the plugin of volumes that name none",
        parse=options.text,
        default=None,
        shown="each volume names its own",
        unit="name",
    )
    prefix: str = options.option(
        help="begins the names that new volumes have at the plugin",
        parse=_prefix,
        default="",
        shown="none",
        unit="text",
    )
    default_options: Sequence[tuple[str, str]] = options.option(
        help="what the plugin gets with each new volume that does not say otherwise",
        parse=options.pair_list,
        default=(),
        shown="nothing",
        unit="list of KEY=VALUE",
    )
    recreate: bool = options.option(
        help="make a volume again, at its next mount, that the plugin has lost: for "
        "plugins like rclone, whose volumes are but definitions",
        parse=options.boolean,
        default=False,
        unit="true, false",
    )
    time_limit: float | None = options.option(
        help="how long a call to the plugin may take",
        parse=options.seconds,
        default=None,
        shown="100 for Create and Mount, 45 for others",
        unit="seconds",
    )
    sockets: Sequence[str] = options.option(
        help="where plugins' sockets are looked for",
        parse=options.path_list,
        default=SOCKETS,
        shown="Docker's and PouchContainer's",
        unit="list of paths",
    )
    specs: Sequence[str] = options.option(
        help="where .spec and .json files of plugins are looked for",
        parse=options.path_list,
        default=SPECS,
        shown="Docker's and PouchContainer's",
        unit="list of paths",
    )

    def __attrs_post_init__(self) -> None:
        keys = [key for key, _ in self.default_options]
        if len(set(keys)) < len(keys):
            raise ValueError("default-options has an option twice; give each once")

    @property
    def folders(self) -> Folders:
        """Where plugins are looked for."""
        return Folders(sockets=self.sockets, specs=self.specs)


def passed(config: PluginConfig, asked: PluginOptions) -> dict[str, str]:
    """Return the options that the plugin gets with a new volume.

    Raise `InvalidArgument` where X and pass.X are both given and differ.
    """
    own: dict[str, str] = {}
    for key, value in asked.rest.items():
        name = key.removeprefix(_PASS)
        if own.setdefault(name, value) != value:
            raise InvalidArgument(
                f"options {name} and {_PASS}{name} are the same to the plugin and "
                f"differ; give one"
            )
    return {**dict(config.default_options), **own}
