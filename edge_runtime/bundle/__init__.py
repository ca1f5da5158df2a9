"""Models on disk and on the way to a device: signed manifest, content-addressed slices, resumable transfer."""

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.bundle.signing import BundleSigningKey
from edge_runtime.bundle.store import BundleStore, PartialBundle
from edge_runtime.bundle.writer import BundleWriter

__all__ = ["Bundle", "BundleSigningKey", "BundleStore", "BundleWriter", "Manifest", "PartialBundle"]
