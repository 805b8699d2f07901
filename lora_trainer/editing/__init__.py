"""Captions edited where they live: tags over many pictures, files rewritten in place, undo."""
