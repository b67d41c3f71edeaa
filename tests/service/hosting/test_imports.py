import subprocess
import sys

# What takes seconds to import and no request needs. The first imports torch._dynamo, which is a second PyTorch.
NEEDLESS = """torchvision timm torch._dynamo torch._inductor huggingface_hub httpx matplotlib onnx pandas scipy sklearn
sympy tensorboard ray aiohttp grpc google.protobuf opentelemetry.sdk pytest rich""".split()  # noqa: SIM905


def test_a_server_imports_nothing_that_it_does_not_need() -> None:
    """Nor does the `supervit` command, before it knows what it is to do."""
    modules = "service.cli, service.commands.command, service.hosting.serve, service.engines.torch_engine"
    found = f"import sys, {modules}; print(*(name for name in {NEEDLESS!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
