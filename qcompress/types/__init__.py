"""The nouns, frozen values: settings, plans, encoded tensors, runs. No module imports torch at run time."""

VERSION = "0.1.0"
"""The package's version, which manifests and reports name."""
