"""The shelf of exporters, imported as edgekit.exporters: one file each, found through the registry.

Never imported as `exporters`, for then its files would exist twice.
"""

if __name__ != "edgekit.exporters":
    raise ImportError(
        "'exporters' is a folder of edgekit: `pip install -e .`, then import edgekit.exporters"
    )
