"""The Open Inference Protocol (KServe's v2 and Triton's extensions) as values, independent of HTTP and gRPC."""
