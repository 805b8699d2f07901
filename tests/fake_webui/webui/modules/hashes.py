import hashlib

# As the WebUI's cache.json: what was computed once is known from then on.
known = {}


def calculate_sha256(filename):
    with open(filename, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def sha256_from_cache(filename, title, use_addnet_hash=False):
    return known.get(title)


def sha256(filename, title, use_addnet_hash=False):
    if title not in known:
        known[title] = calculate_sha256(filename)
    return known[title]
