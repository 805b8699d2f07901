import os


def walk_files(path, allowed_extensions=None):
    for root, _, files in sorted(os.walk(path, followlinks=True)):
        for filename in sorted(files):
            if allowed_extensions is None or os.path.splitext(filename)[1].lower() in allowed_extensions:
                yield os.path.join(root, filename)
