"""Limits on what a volume holds: by project quota, btrfs qgroups, or loop images."""
