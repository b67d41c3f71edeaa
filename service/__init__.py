"""The server: adaptive image classification over HTTP with one shared-weight SuperViT.

Importing OpenVINO would report it to Google Analytics and leave files in the home folder, unasked. It does neither
where its telemetry package cannot be imported.
"""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # None is what makes an import fail
