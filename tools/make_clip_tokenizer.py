"""Write CLIP's tokenizer files from the vocabulary that OpenAI published (MIT, github.com/openai/CLIP).

usage: python tools/make_clip_tokenizer.py bpe_simple_vocab_16e6.txt.gz FOLDER

The PyPI package open_clip_torch ships the .gz. The result is what transformers calls
openai/clip-vit-large-patch14's tokenizer: 49,408 tokens, of which 256 bytes, 256 bytes at a word's end,
48,894 merges and the two marks.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

MERGES = 48_894
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def bytes_as_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(rest))]


def write(vocabulary: Path, folder: Path) -> None:
    text = gzip.decompress(vocabulary.read_bytes()).decode("utf-8")
    lines = text.split("\n")[1 : MERGES + 1]
    letters = bytes_as_characters()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(line.replace(" ", "") for line in lines),
        BEGIN,
        END,
    ]
    files = {
        "vocab.json": json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *lines, ""]),
        "special_tokens_map.json": json.dumps(
            {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}, indent=2
        ),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "bos_token": BEGIN,
                "eos_token": END,
                "unk_token": END,
                "pad_token": END,
                "do_lower_case": True,
                "model_max_length": 77,
            },
            indent=2,
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
