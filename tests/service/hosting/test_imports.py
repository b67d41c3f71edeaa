import subprocess
import sys

# Modules that take seconds to import and that no request needs. The first one imports torch._dynamo, which takes as
# long as PyTorch itself.
NEEDLESS = """torchvision timm torch._dynamo torch._inductor huggingface_hub httpx matplotlib onnx pandas scipy sklearn
sympy tensorboard ray aiohttp grpc google.protobuf opentelemetry.sdk pytest rich""".split()  # noqa: SIM905


def test_a_server_does_not_import_slow_modules_that_it_does_not_need() -> None:
    """Neither does the `supervit` command before it knows which command to run."""
    modules = "service.cli, service.commands.command, service.hosting.serve, service.engines.torch_engine"
    found = f"import sys, {modules}; print(*(name for name in {NEEDLESS!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
