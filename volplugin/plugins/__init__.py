"""Other volume plugins, as an engine sees them: found by name, called, watched.

Facts are those of dockerd, whose plugins these are: "Docker Plugin API", "Docker volume
plugins", and moby's pkg/plugins.
"""
