"""Images in compressed form to tensors on a device.

::

    image = await decode_image(data, device="cuda")  # (height, width, 3) of uint8, RGB

JPEG files are decoded on the GPU, by nvImageCodec, in batches that form while it is busy. Pillow decodes everything else, in
threads, and everything where there is no GPU.
"""

from __future__ import annotations

from aiotrt._install import install_hint
from aiotrt.errors import MissingDependencyError

try:
    import PIL  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(f"aiotrt.decoding needs {error.name}; {install_hint('decode')}") from error

from aiotrt.decoding.decoder import Decoder, decode_image
from aiotrt.decoding.errors import ImageError, ImageTooLargeError

__all__ = ["Decoder", "ImageError", "ImageTooLargeError", "decode_image"]
