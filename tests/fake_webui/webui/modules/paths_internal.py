"""The paths are set by whoever installs the stand-in, before anything else is imported."""

data_path = ""
models_path = ""
