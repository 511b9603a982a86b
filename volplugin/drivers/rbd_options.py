"""What users and operators can say of the driver ``rbd``."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from volplugin import options as declare
from volplugin.drivers import ceph_settings, declared
from volplugin.errors import InvalidArgument
from volplugin.host import filesystems
from volplugin.parsers import nearest, quote
from volplugin.sizes import format_size

DEFAULT_SIZE: Final = 10 << 30
"""Bytes of a volume that nobody gave a size; PouchContainer's."""

# Each feature with the one that it rests on, see rbd(8).
FEATURES: Final[Mapping[str, str | None]] = {
    "layering": None,
    "exclusive-lock": None,
    "object-map": "exclusive-lock",
    "fast-diff": "object-map",
    "deep-flatten": None,
    "journaling": "exclusive-lock",
}

_NAME: Final = re.compile(r"[A-Za-z0-9_.-][A-Za-z0-9_. +:-]{0,254}")
_OF: Final = "its file system"  # whose blocks and inodes mkfs.* are about
_LEAST_OBJECT, _LARGEST_OBJECT = 4 << 10, 32 << 20


def _features(text: str) -> tuple[str, ...]:
    asked = text.split(",") if text else []
    for name in asked:
        if name not in FEATURES:
            raise InvalidArgument(
                f"{quote(name)} is no feature{nearest(name, FEATURES)}; there are"
                f" {', '.join(FEATURES)}, with commas between"
            )
        needed = FEATURES[name]
        if needed is not None and needed not in asked:
            raise InvalidArgument(f"{name} needs {needed}: give it too")
    return tuple(name for name in FEATURES if name in asked)


def _object_size(text: str) -> int:
    parse = declare.size(minimum=_LEAST_OBJECT, maximum=_LARGEST_OBJECT)
    value = parse(text)
    if value & (value - 1):
        raise InvalidArgument(f"{quote(text)} is no power of 2; give 4M or such")
    return value


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise InvalidArgument(
            f"{quote(text)} is no name of a pool, a namespace or an image: letters,"
            " digits and _.+:- may be in it, and none of / and @"
        )
    return text


def _source(text: str) -> str:
    volume, at, snapshot = text.partition("@")
    if not volume or (at and not snapshot) or "@" in snapshot or "/" in text:
        raise InvalidArgument(
            f"{quote(text)} names no volume; give VOLUME or VOLUME@SNAPSHOT"
        )
    return declare.text(text)


def _conflict_option(default: str | None, shown: str = "") -> Any:
    return declare.option(
        help="if another host has it: fail, wait until it is free or dead, or fence",
        parse=declare.choice("fail", "wait", "fence"),
        default=default,
        shown=shown,
        unit="name",
    )


def _features_option(name: str, default: tuple[str, ...] | None) -> Any:
    return declare.option(
        name=name,
        help="features of a new image",
        parse=_features,
        default=default,
        shown=", ".join(default) if default else "the backend's",
        unit="names",
        format=",".join,
    )


def _object_size_option(default: int | None) -> Any:
    return declare.option(
        help="bytes of the objects that a new image is split into",
        parse=_object_size,
        default=default,
        shown="" if default else "the backend's",
        unit="bytes",
        format=format_size,
    )


def _text_option(help_: str, *, shown: str, unit: str = "name", name: str = "") -> Any:
    return declare.option(
        name=name, help=help_, parse=_name, default=None, shown=shown, unit=unit
    )


def _path_option(help_: str, *, shown: str) -> Any:
    return declare.option(
        help=help_, parse=declare.absolute_path, default=None, shown=shown, unit="path"
    )


@attrs.frozen(kw_only=True)
class RbdOptions:
    """What a user can say of one volume; PouchContainer's words are among them."""

    size: int | None = declare.option(
        help="how large it is",
        parse=declare.size(),
        default=None,
        shown=f"{format_size(DEFAULT_SIZE)}, or as its source",
        unit="bytes",
        format=format_size,
    )
    fs: str | None = declare.option(
        help="file system: ext4 or xfs",
        parse=declare.choice(*filesystems.MINIMUM),
        default=None,
        shown="the backend's, or as its source",
        unit="name",
    )
    uid: int | None = declared.uid_option(None)
    gid: int | None = declared.gid_option(None)
    mode: int | None = declared.mode_option(None, "0755, or as its source")
    access: str = declare.option(
        help="rw for one host at a time, ro for many",
        parse=declare.choice("rw", "ro"),
        default="rw",
        unit="name",
    )
    on_conflict: str | None = _conflict_option(None, "the backend's")
    from_: str | None = declare.option(
        name="from",
        help="copy this volume, or its snapshot",
        parse=_source,
        default=None,
        shown="a new file system",
        unit="VOLUME[@SNAPSHOT]",
    )
    base: str | None = declare.option(
        help="the same as from",
        parse=_source,
        default=None,
        shown="none",
        unit="VOLUME[@SNAPSHOT]",
    )
    image: str | None = _text_option(
        "take this image that exists, with its files; it is never deleted",
        shown="a new image",
    )
    encryption: str | None = declare.option(
        help="encrypt a new image: luks1 or luks2",
        parse=declare.choice("luks1", "luks2"),
        default=None,
        shown="none, or as its source",
        unit="name",
    )
    encryption_key: str | None = _path_option(
        "file with the passphrase, on every host; for root alone",
        shown="the backend's",
    )
    pool: str | None = _text_option("pool of the image", shown="the backend's")
    features: tuple[str, ...] | None = _features_option("", None)
    image_feature: tuple[str, ...] | None = _features_option("image-feature", None)
    object_size: int | None = _object_size_option(None)
    discard: bool = declare.option(
        help="give the space of deleted files back to the cluster",
        parse=declare.boolean,
        default=True,
        unit="true, false",
    )
    conf: str | None = _path_option("must be the backend's", shown="the backend's")
    key: str | None = _path_option(
        "keyring file; must be the backend's", shown="the backend's"
    )
    mkfs_block_size: int | None = declared.mkfs_option("block-size", _OF)
    mkfs_inode_size: int | None = declared.mkfs_option("inode-size", _OF)
    mkfs_inode_ratio: int | None = declared.mkfs_option("inode-ratio", _OF)
    mkfs_journal_size: int | None = declared.mkfs_option("journal-size", _OF)

    def __attrs_post_init__(self) -> None:
        """Refuse what contradicts itself; `ValueError` as attrs has it."""
        _require_same("from", self.from_, "base", self.base)
        _require_same("features", self.features, "image-feature", self.image_feature)
        filled = [f"mkfs.{key}" for key in self.mkfs]
        if self.source is not None or self.image is not None:
            origin = "image=" if self.image else "from="
            if self.image and self.source:
                raise ValueError("from= and image= exclude each other: give one")
            if filled:
                raise ValueError(
                    f"{filled[0]} is for a new file system, and {origin} has one:"
                    " leave one of them out"
                )
        if self.image is not None:
            for key, value in (
                ("uid", self.uid),
                ("gid", self.gid),
                ("mode", self.mode),
                ("features", self.asked_features),
                ("object-size", self.object_size),
            ):
                if value is not None:
                    raise ValueError(
                        f"{key}: an image that exists stays as it is: leave {key} out"
                    )
        elif self.access == "ro" and self.source is None:
            raise ValueError(
                "access=ro: a new volume would stay empty; give from= or image= as well"
            )

    @property
    def source(self) -> str | None:
        """What is to be copied: ``VOLUME`` or ``VOLUME@SNAPSHOT``."""
        return self.from_ or self.base

    @property
    def asked_features(self) -> tuple[str, ...] | None:
        """The features under either of their names."""
        return self.features if self.features is not None else self.image_feature

    @property
    def mkfs(self) -> Mapping[str, str]:
        """What is asked of mkfs, by name without ``mkfs.``."""
        return declared.mkfs_given(self)


@attrs.frozen(kw_only=True)
class RbdConfig:
    """What an operator can say of the backend."""

    conf: str = ceph_settings.conf_setting()
    user: str = ceph_settings.user_setting()
    keyring: str | None = ceph_settings.keyring_setting()
    pool: str = declare.option(
        help="pool of the images and records", parse=_name, default="rbd", unit="name"
    )
    namespace: str | None = _text_option(
        "namespace in the pool; all hosts with the same share their volumes",
        shown="none",
    )
    data_pool: str | None = _text_option(
        "pool for the data of new images, such as an erasure-coded one",
        shown="the pool itself",
    )
    mapper: str = declare.option(
        help="what makes images devices: krbd, rbd-nbd, qemu, or the first that works",
        parse=declare.choice("auto", "krbd", "rbd-nbd", "qemu"),
        default="auto",
        unit="name",
    )
    fs: str = declare.option(
        help="file system of new volumes: ext4 or xfs",
        parse=declare.choice(*filesystems.MINIMUM),
        default="ext4",
        unit="name",
    )
    features: tuple[str, ...] = _features_option("", tuple(FEATURES)[:5])
    object_size: int = _object_size_option(4 << 20)
    fsck: str = declare.option(
        help="check a file system before it is mounted: auto (where it was not"
        " unmounted), always or never",
        parse=declare.choice("auto", "always", "never"),
        default="auto",
        unit="name",
    )
    on_conflict: str = _conflict_option("fail")
    wait_limit: float = declare.option(
        help="how long on-conflict=wait waits for another host",
        parse=declare.seconds,
        default=60.0,
        unit="seconds",
    )
    encryption_key: str | None = _path_option(
        "file with the passphrase of volumes that name none", shown="none"
    )
    timeout: float = ceph_settings.timeout_setting()
    host_name: str | None = ceph_settings.host_name_setting()
    root: str | None = declared.root_setting()


def _require_same(
    name: str,
    value: str | Sequence[str] | None,
    other: str,
    alias: str | Sequence[str] | None,
) -> None:
    if value is not None and alias is not None and value != alias:
        raise ValueError(f"{name} and {other} mean the same and differ: give one")
