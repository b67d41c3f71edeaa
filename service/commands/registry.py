"""The commands by name: summary, where their options and functions are, and examples.

Imports none of them: the list of commands is shown and completed at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its options, its function and its help.

    Attributes:
        summary: its line in the list of commands.
        options: the pydantic model of its options, as module:name; help imports that module.
        run: the function that takes the options, as module:name; its module is imported once the options are read.
        examples: shell command lines, each with what it does.
        panels: titles of the panels of its help, by the option that each begins with.
    """

    summary: str
    options: str
    run: str
    examples: Mapping[str, str]
    panels: Mapping[str, str] = field(default_factory=dict)


COMMANDS = {
    "serve": Command(
        "Serve a checkpoint over HTTP.",
        options="service.settings:Settings",
        run="service.hosting.serve:serve",
        examples={
            "supervit serve": "the default checkpoint, on http://127.0.0.1:8000",
            "supervit serve --checkpoint supervit-micro-cifar10 --port 9000 --cascades": "a small one, with cascades",
            "supervit serve --host 0.0.0.0 --max-utilization 0.6": "on every interface, with 60 % of this machine",
            "SUPERVIT_PORT=9000 supervit serve": "every option is also an environment variable",
        },
        panels={
            "host": "Network",
            "workers": "Engine",
            "policy": "Scheduling",
            "max_in_flight": "Limits",
            "log_level": "Logging",
        },
    ),
    "classify": Command(
        "Classify photos in this process or with a server.",
        options="service.commands.options:Classify",
        run="service.commands.classify:classify",
        examples={
            "supervit classify cat.jpg dog.jpg --budget-gflops 2.3": "two photos, each within a budget",
            "supervit classify photos --format csv > answers.csv": "every photo of a folder, as CSV",
            "curl -s https://example.org/cat.jpg | supervit classify -": "an image from a pipe",
            "supervit classify cat.jpg --explain cat.png": "draw the patches that the sub-network kept",
            "supervit classify *.jpg --url http://127.0.0.1:8000 --format json": "with a server, as JSON lines",
        },
        panels={"url": "Server or checkpoint", "format": "Output"},
    ),
    "train": Command(
        "Train a checkpoint on a folder of images.",
        options="models.training.recipe:Recipe",
        run="service.commands.train:train",
        examples={
            "supervit train my_photos --output runs/mine --epochs 100": "from scratch",
            "supervit train my_photos --output runs/mine --epochs 100 --resume": "resume where it stopped",
            "supervit train my_photos --output runs/tuned --init vit.pth": "from the weights of any plain ViT",
        },
        panels={
            "model": "Model",
            "teacher": "Teacher",
            "epochs": "Optimization",
            "label_smoothing": "Regularization and augmentation",
            "holdout": "Data and machine",
        },
    ),
    "convert": Command(
        "Convert a plain ViT into a SuperViT, without training.",
        options="models.conversion.options:Convert",
        run="service.commands.convert:convert",
        examples={
            "supervit convert deit_small.pth --output elastic.safetensors": "with default patch grids and keep rates",
            "supervit convert dinov2.onnx --patch-grids 8,16 --output elastic.safetensors": "with other patch grids",
        },
    ),
    "evaluate": Command(
        "Measure the accuracy of every sub-network.",
        options="service.commands.options:Evaluate",
        run="service.commands.evaluate:evaluate",
        examples={
            "supervit evaluate runs/mine/checkpoint.safetensors my_photos": "write into the checkpoint, and plot",
            "supervit evaluate elastic.safetensors my_photos --rates-between --half": "more keep rates, half the size",
        },
    ),
    "quantize": Command(
        "Prepare a checkpoint for int8 inference on CPUs.",
        options="service.commands.options:Quantize",
        run="service.commands.quantize:quantize",
        examples={
            "supervit quantize elastic.safetensors my_photos": "calibrate on val/, measure on test/",
            "supervit quantize elastic.safetensors my_photos --output int8.safetensors": "write to another file",
        },
    ),
    "profile": Command(
        "Measure the latency of every sub-network on this machine.",
        options="service.commands.options:Profile",
        run="service.commands.profile:profile",
        examples={
            "supervit profile --plot-file profile.png": "measure, or show an earlier measurement, and plot it",
            "supervit profile --fresh --threads 2 --max-batch-size 8": "measure again, as for a smaller machine",
        },
    ),
    "key": Command(
        "Create an API key and its entry for a file of keys.",
        options="service.commands.options:Key",
        run="service.commands.key:key",
        examples={
            "supervit key doorbells >> keys.toml": "append the entry to the file, show the key on the terminal",
            "supervit key doorbells": "show both",
        },
    ),
    "bench": Command(
        "Load-test a server with open-loop traffic.",
        options="service.bench.options:Bench",
        run="service.commands.bench:bench",
        examples={
            "supervit bench http://127.0.0.1:8000 --rate 20,40": "at two rates, one after the other",
            "supervit bench http://127.0.0.1:8000 --trace arrivals.csv --json-file -": "replay a trace, print JSON",
            "supervit bench http://127.0.0.1:8001 --protocol v2 --model vit": "Triton, KServe and other servers",
        },
        panels={"images": "Requests", "json_file": "Output"},
    ),
    "simulate": Command(
        "Simulate traffic against this machine's profile.",
        options="service.simulation.options:Simulate",
        run="service.commands.simulate:simulate",
        examples={
            "supervit simulate --rate 300 --budget-ms 100 --machines 2": "the share of requests answered in time",
            "supervit simulate --load 0.5,1,2 --compare slackfit --plot-file load.png": "compare policies, and plot",
            "supervit simulate --rate 300 --arrivals gamma --slowdown 10:2.5,20:1": "bursts, and a noisy neighbour",
        },
        panels={"policy": "Machines", "json_file": "Output"},
    ),
}
