"""What the kernel says of this process's memory."""

from __future__ import annotations

from edgekit import machine


def test_the_peak_of_this_process_is_told_and_forgotten() -> None:
    held = b"\1" * (64 << 20)
    with_it = machine.peak_bytes()
    assert with_it is not None and with_it > len(held)
    del held
    assert (machine.peak_bytes() or 0) > with_it - (1 << 20)  # the kernel counts in batches
    machine.forget_peak()
    assert (machine.peak_bytes() or 0) < with_it - (60 << 20)
