import re

re_break = re.compile(r"\s*\bBREAK\b\s*")
re_weighted = re.compile(r"\(([^():]*):([\d.]+)\)")


def parse_prompt_attention(text):
    """[text, weight] pieces: only `(text:weight)` and BREAK, as ["BREAK", -1]."""
    pieces = []
    for number, part in enumerate(re_break.split(text)):
        if number:
            pieces.append(["BREAK", -1])
        plain, *found = re_weighted.split(part)
        pieces.append([plain, 1.0])
        for inner, weight, after in zip(found[::3], found[1::3], found[2::3], strict=True):
            pieces += [[inner, float(weight)], [after, 1.0]]
    return [piece for piece in pieces if piece[0]] or [["", 1.0]]
