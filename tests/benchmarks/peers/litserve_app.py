"""LitServe: two worker processes, which form the batches, behind one front end; images come as base64 in JSON."""

import base64
import sys

import litserve

from tests.benchmarks.peers.model import MAX_BATCH_SIZE, MAX_WAIT_S, Model


class Classify(litserve.LitAPI):
    """Classifies batches of encoded images."""

    def setup(self, _device: str) -> None:
        self.model = Model()

    def decode_request(self, request: dict[str, str]) -> bytes:
        return base64.b64decode(request["image"])

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, batch: list[bytes]) -> list[int]:
        return self.model(batch)

    def unbatch(self, output: list[int]) -> list[int]:
        return output

    def encode_response(self, output: int) -> dict[str, int]:
        return {"index": output}


if __name__ == "__main__":
    api = Classify(max_batch_size=MAX_BATCH_SIZE, batch_timeout=MAX_WAIT_S)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=2)
    server.run(host="127.0.0.1", port=int(sys.argv[-1]), generate_client_file=False, log_level="warning")
