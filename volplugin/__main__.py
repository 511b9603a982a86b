"""``python -m volplugin``."""

from volplugin.cli import main

main()
