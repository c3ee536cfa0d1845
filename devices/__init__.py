"""The shelf of devices: see docs for how to add one. Imported as edgekit.devices, never as devices."""

if __name__ != "edgekit.devices":
    raise ImportError("'devices' is a folder of edgekit: import edgekit.devices (pip install -e . first)")
