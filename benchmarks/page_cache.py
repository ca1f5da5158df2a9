"""Taking a bundle's experts out of the page cache, so that what is read comes from flash.

Knows: fadvise. Does not know: what is measured.
"""

from __future__ import annotations

import os

from edge_runtime.bundle.bundle import Bundle


def forget(bundle: Bundle) -> None:
    """Pages that are dirty or mapped by another process stay."""
    for block in bundle.manifest.layers:
        for key in bundle.manifest.expert_slices(block):
            descriptor = os.open(bundle.slice_path(key), os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
