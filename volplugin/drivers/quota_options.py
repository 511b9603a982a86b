"""What users and operators can say of the driver ``quota``."""

from collections.abc import Mapping
from typing import Final

import attrs

from volplugin import options as declare
from volplugin.drivers import declared
from volplugin.quota.ids import IdRange
from volplugin.sizes import format_size

LOOP: Final = "loop"
"""The mechanism of a volume that is an image."""

_OF: Final = "a loop image"  # whose blocks and inodes mkfs.* are about


@attrs.frozen(kw_only=True)
class QuotaOptions:
    """What a user can say of one volume."""

    size: int | None = declare.option(
        help="how much it can hold; must be given",
        parse=declare.size(),
        default=None,
        unit="bytes",
        format=format_size,
    )
    inodes: int | None = declared.inodes_option()
    quota: str | None = declare.option(
        help="what limits it: project, btrfs or loop",
        parse=declare.choice("project", "btrfs", LOOP),
        default=None,
        shown="the first that works",
        unit="name",
    )
    fs: str | None = declare.option(
        help="file system of a loop image: ext4 or xfs",
        parse=declare.choice("ext4", "xfs"),
        default=None,
        shown="ext4",
        unit="name",
    )
    prealloc: bool = declare.option(
        help="take a loop image's space on the disk at once",
        parse=declare.boolean,
        default=False,
        unit="true, false",
    )
    uid: int = declared.uid_option()
    gid: int = declared.gid_option()
    mode: int = declared.mode_option(0o755)
    mkfs_block_size: int | None = declared.mkfs_option("block-size", _OF)
    mkfs_inode_size: int | None = declared.mkfs_option("inode-size", _OF)
    mkfs_inode_ratio: int | None = declared.mkfs_option("inode-ratio", _OF)
    mkfs_journal_size: int | None = declared.mkfs_option("journal-size", _OF)

    @property
    def mkfs(self) -> Mapping[str, str]:
        """What is asked of mkfs, by name without ``mkfs.``."""
        return declared.mkfs_given(self)

    @property
    def for_images(self) -> list[str]:
        """The options given that only a loop image has."""
        given = [f"mkfs.{key}" for key in self.mkfs]
        given += ["fs"] if self.fs is not None else []
        return given + (["prealloc"] if self.prealloc else [])


@attrs.frozen(kw_only=True)
class QuotaConfig:
    """What an operator can say of the backend."""

    root: str | None = declared.root_setting()
    project_ids: IdRange = declared.ids_setting()
    overcommit: float | None = declared.overcommit_setting()
