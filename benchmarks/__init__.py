"""Measurements of volplugin beside `rclone serve docker`: see README.rst."""
