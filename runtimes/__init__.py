"""The shelf of runtimes, imported as edgekit.runtimes: one file each, found through the registry.

Never imported as `runtimes`, for then its files would exist twice.
"""

if __name__ != "edgekit.runtimes":
    raise ImportError(
        "'runtimes' is a folder of edgekit: `pip install -e .`, then import edgekit.runtimes"
    )
