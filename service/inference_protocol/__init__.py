"""The Open Inference Protocol (KServe's v2 and Triton's extensions) as values: no HTTP and no gRPC, which carry it."""
