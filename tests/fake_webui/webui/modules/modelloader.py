import os

from modules import util

# What was asked for; a test that lets something be downloaded puts the bytes under its name.
downloads = []
internet = {}


def load_file_from_url(url, *, model_dir, progress=True, file_name=None, hash_prefix=None):
    os.makedirs(model_dir, exist_ok=True)
    cached_file = os.path.abspath(os.path.join(model_dir, file_name))
    if not os.path.exists(cached_file):
        downloads.append(url)
        with open(cached_file, "wb") as file:
            file.write(internet[file_name])
    return cached_file


def load_models(model_path, model_url=None, command_path=None, ext_filter=None, download_name=None):
    """As the real one: what goes wrong is swallowed, and the list stays empty."""
    output = []
    try:
        output += util.walk_files(model_path, allowed_extensions=ext_filter)
        if model_url is not None and not output:
            output.append(load_file_from_url(model_url, model_dir=model_path, file_name=download_name))
    except Exception:
        pass
    return output
