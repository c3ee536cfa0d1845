"""The shelf of devices, imported as edgekit.devices: one file each, found through the registry.

Never imported as `devices`, for then its files would exist twice.
"""

if __name__ != "edgekit.devices":
    raise ImportError(
        "'devices' is a folder of edgekit: `pip install -e .`, then import edgekit.devices"
    )
