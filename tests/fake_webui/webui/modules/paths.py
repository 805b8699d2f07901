import os

from modules.paths_internal import models_path  # noqa: F401

# Of the repositories that the WebUI clones; their own folders are on sys.path.
paths = {"BLIP": os.path.join(os.path.dirname(__file__), "..", "models")}
