"""Captions written by models: rules, a resumable run over a folder, and the captioners."""
