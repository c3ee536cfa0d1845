"""The shelf of exporters: see docs for how to add one. Imported as edgekit.exporters, never as exporters."""

if __name__ != "edgekit.exporters":
    raise ImportError("'exporters' is a folder of edgekit: import edgekit.exporters (pip install -e . first)")
