"""mosec: two processes behind its Rust front end, which forms the batches."""

from mosec import Server, Worker

from tests.benchmarks.peers.model import MAX_BATCH_SIZE, MAX_WAIT_S, Model


class Classify(Worker):
    """Classifies batches of encoded images."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[int]:
        return self.model(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Classify, num=2, max_batch_size=MAX_BATCH_SIZE, max_wait_time=int(1000 * MAX_WAIT_S))
    server.run()
