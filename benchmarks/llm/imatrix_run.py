"""One importance matrix by edgekit, as a program of its own: MODEL.gguf TEXT, prints the file.

Never knows peers. The cache that it may answer from lies below EDGEKIT_HOME.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgekit import _fs
from edgekit.exporters import imatrix

model, text = map(Path, sys.argv[1:])
# More chunks than any text has: all of them.
calibration, content = imatrix.calibration(text, 10_000)
key = {model.name: _fs.sha256_file(model)}
print(imatrix.cached(model, key, calibration, content, lambda done, total: None))
