"""One file per model family: its tensor names and metadata in GGUF terms.

Three files are none: config (a checked config.json), rope (rotary positions) and family (what every
family is).
"""
