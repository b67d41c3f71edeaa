"""The server: adaptive image classification over HTTP with one shared-weight SuperViT.

Importing OpenVINO sends a report to Google Analytics and leaves files in the home folder, unasked, unless its telemetry
package cannot be imported. Its import is therefore made to fail here.
"""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # None makes its import fail
