"""What the tests share: a host of their own, the plugin in it, a real dockerd, waits.

Nothing here is faked: a `Host` is a mount namespace, a `Plugin` is the real server as
a process, a `Docker` is the real daemon with its own command line.
"""
