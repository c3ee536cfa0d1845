"""The shelf of runtimes: see docs for how to add one. Imported as edgekit.runtimes, never as runtimes."""

if __name__ != "edgekit.runtimes":
    raise ImportError("'runtimes' is a folder of edgekit: import edgekit.runtimes (pip install -e . first)")
