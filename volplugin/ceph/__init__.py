"""Ceph: what both of its drivers share.

The connection to a cluster, the records of shared volumes in it, and who holds them.
Everything here blocks, and may be called from any thread. Nothing here knows of a
driver. rados, rbd and cephfs are imported by `bindings` alone.
"""
