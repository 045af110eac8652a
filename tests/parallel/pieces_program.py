"""`rwkvmpi ARGUMENTS`, where bodies that pass through the host are cut into pieces of 8 KiB: small ones too."""

from functools import partial

from rwkvmpi.grid import device_transport

device_transport.DeviceTransport = partial(device_transport.DeviceTransport, piece_bytes=8192)  # type: ignore

if __name__ == "__main__":
    import runpy

    runpy.run_module("rwkvmpi", run_name="__main__")
