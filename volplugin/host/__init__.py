"""The kernel: mounts, namespaces, paths and attributes.

Everything here blocks and may be called from any thread. Nothing here knows of
volumes. `OSError` is turned into the errors of `volplugin.errors`, chained, except
where a docstring says otherwise. ctypes, subprocess and xattr are imported here alone.
"""
