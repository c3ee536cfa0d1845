"""One file per model family: its tensor names and metadata in GGUF terms."""
