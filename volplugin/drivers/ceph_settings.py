"""Settings that the drivers of Ceph declare alike: which cluster, and as whom."""

from typing import Any, Final

from volplugin import options
from volplugin.ceph.cluster import Access

_DEFAULTS: Final = Access()


def conf_setting() -> Any:
    """Declare the setting for the cluster's configuration file."""
    return options.option(
        help="the cluster's configuration",
        parse=options.absolute_path,
        default=_DEFAULTS.conf,
        unit="path",
    )


def user_setting() -> Any:
    """Declare the setting for the user's name."""
    return options.option(
        help="who volplugin is in the cluster, without client.",
        parse=options.text,
        default=_DEFAULTS.user,
        unit="name",
    )


def keyring_setting() -> Any:
    """Declare the setting for the file with the user's key."""
    return options.option(
        help="file with the user's key",
        parse=options.absolute_path,
        default=_DEFAULTS.keyring,
        shown="where conf says",
        unit="path",
    )


def timeout_setting() -> Any:
    """Declare the setting for how long the cluster is waited for."""
    return options.option(
        help="for one operation of the cluster",
        parse=options.seconds,
        default=_DEFAULTS.timeout,
        unit="seconds",
    )


def host_name_setting() -> Any:
    """Declare the setting for this host's name; None is the one that it has."""
    return options.option(
        help="what this host is called in the messages of others",
        parse=options.text,
        default=None,
        shown="the host's name",
        unit="name",
    )


def access_of(config: Any) -> Access:
    """Return how the cluster is reached by settings that have the first four here."""
    return Access(
        conf=config.conf,
        user=config.user,
        keyring=config.keyring,
        timeout=config.timeout,
    )
